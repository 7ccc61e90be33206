"""Benchmarks. Each script prints a table and writes a CSV. ``plot`` draws figures from the CSV."""
