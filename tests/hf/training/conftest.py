"""Runs without pictures."""

from __future__ import annotations

import pytest


@pytest.fixture
def pictures():
    """Ask for the picture of a run's loss."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Leave the picture out, which takes longer than a tiny run, unless a test asks for it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)
