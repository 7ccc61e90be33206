"""Tiles of the sweeps: ``sizes`` (defaults and limits), ``search`` (tuning), ``store`` (disk)."""
