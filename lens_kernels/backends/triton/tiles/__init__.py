"""The tiles of the sweeps: ``sizes`` has defaults and limits, ``search`` tunes, ``store`` saves."""
