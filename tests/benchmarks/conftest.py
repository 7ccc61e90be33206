"""Fixtures for the tests of the benchmarks: a fake clock, and whether figures are drawn."""

import itertools

import pytest

from benchmarks.support import plot, timing


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """Skip the drawing of figures, unless a test uses ``figures``.

    Drawing takes most of the time of a tiny run.
    """
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plot, "no_matplotlib", lambda: "no picture")


@pytest.fixture
def figures():
    """Let this test draw figures, which needs matplotlib."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock: the first timed call takes 1 s, the second 2 s, and so on."""
    ticks = itertools.count(1)

    def seconds(function, device):
        function()
        return next(ticks)

    monkeypatch.setattr(timing, "seconds", seconds)
    return seconds
