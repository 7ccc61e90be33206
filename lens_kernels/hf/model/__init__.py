"""Causal language models: loading, blocks, lens heads and hidden states."""
