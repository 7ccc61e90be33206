"""Reference implementations for the tests, written from the definitions in float64."""
