"""The ``torch`` backend: chunks of rows, GEMMs by torch, and a pointwise pass between them."""
