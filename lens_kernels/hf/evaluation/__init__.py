"""Evaluation: cross entropy on held-out text, and ROUGE-L of generated answers."""
