"""The ``torch`` backend: row chunks, products by torch, and a pointwise pass between them."""
