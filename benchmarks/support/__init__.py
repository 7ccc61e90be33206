"""Code that the scripts share: contenders, sizes, measurement, records, tables and figures."""
