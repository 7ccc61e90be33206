"""A clock that no machine can slow down, and no figures where none are looked at."""

import itertools

import pytest

from benchmarks.support import plot, timing


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """Draw nothing, which would take most of the time of a tiny run, but for those who ask."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plot, "no_matplotlib", lambda: "no picture")


@pytest.fixture
def figures():
    """Let a test draw."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def clock(monkeypatch):
    """Let the first timed call take 1 s, the second 2 s, and so on; return the calls' number."""
    ticks = itertools.count(1)

    def seconds(function, device):
        function()
        return next(ticks)

    monkeypatch.setattr(timing, "seconds", seconds)
    return seconds
