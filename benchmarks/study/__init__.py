"""The parts of ``lens_study.py``, in the order of work: data, models, runs, groups, statistics."""
