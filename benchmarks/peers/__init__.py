"""The parts of ``speed_vs_peers.py``: sizes, rounds, the CSV, and limits for the results."""
