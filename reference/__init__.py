"""What the library is checked against: slow, dense, float64, written from the definitions."""
