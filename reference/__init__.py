"""The references of the tests: slow, dense, in float64, written from the definitions."""
