"""Check with tiny models which model types of transformers have a lens."""
