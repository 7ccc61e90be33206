"""The parts of ``lens_study.py``: data, models, runs, groups of runs, statistics and figures."""
