"""The parts of ``speed_vs_peers.py``: points, rounds, the CSV, and limits for the results."""
