"""Benchmarks. Each script prints a table and writes a CSV, from which ``plot`` draws figures."""
