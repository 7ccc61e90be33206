"""Code that several benchmarks use: contenders, sizes, measurements, tables and figures."""
