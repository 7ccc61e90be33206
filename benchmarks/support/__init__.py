"""Code that several scripts use: contenders, sizes, measurements, tables and figures."""
