"""Fixtures of the benchmark tests: a fake clock, and no figures unless a test needs them."""

import itertools

import pytest

from benchmarks.support import plot, timing


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """Skip figures unless a test uses ``figures``. Figures take most of the time of a tiny run."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plot, "no_matplotlib", lambda: "no picture")


@pytest.fixture
def figures():
    """Draw figures in this test, which needs matplotlib."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def clock(monkeypatch):
    """Let the first timed call take 1 s, the second 2 s, and so on."""
    ticks = itertools.count(1)

    def seconds(function, device):
        function()
        return next(ticks)

    monkeypatch.setattr(timing, "seconds", seconds)
    return seconds
