"""References for the tests: slow, dense, float64, written from the definitions."""
