"""A causal language model: how it is read, its blocks, its lens and its hidden states."""
