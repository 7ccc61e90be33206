"""Adapters that bring the lens objective into other libraries' trainers."""
