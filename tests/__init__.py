"""The test suite. ``compare.py``, ``grids.py`` and ``problems.py`` are its common ground."""
