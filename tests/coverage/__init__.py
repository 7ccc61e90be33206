"""Which model types of transformers have a lens: tiny models of each, checked by numbers."""
