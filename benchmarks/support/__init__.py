"""Shared code of the scripts: contenders, sizes, measurement, records, tables and figures."""
