"""The version. It has a file of its own, which the build can read without importing torch."""

__version__ = "0.1.0"
