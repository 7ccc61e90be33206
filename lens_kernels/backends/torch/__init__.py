"""The ``torch`` backend: GEMMs on chunks of rows, and a pointwise pass between the GEMMs."""
