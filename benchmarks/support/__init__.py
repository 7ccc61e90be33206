"""What the scripts share: contenders, sizes, instruments, records, tables and figures."""
