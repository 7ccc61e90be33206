"""Checks for which model types of transformers this library has a lens."""
