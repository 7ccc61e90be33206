"""The picture of the penalties: the facts that it shows are true, and it is drawn."""

import math
import sys

import pytest
import torch

from benchmarks import dual_penalty as bench
from lens_kernels.options import Divergence
from tests.support import ROOT

RATIO = torch.linspace(-6, 6, 25, dtype=torch.float64)
FORWARD, REVERSE = Divergence.FORWARD_KL, Divergence.REVERSE_KL


@pytest.mark.parametrize("divergence", bench.CURVES)
def test_the_curves_agree_near_the_teacher(divergence):
    ratio = torch.tensor([-1e-3, 1e-3], dtype=torch.float64)
    assert torch.allclose(bench.entry(divergence, ratio), ratio.square() / 2, rtol=2e-3)


def test_the_kls_are_mirror_images_and_the_others_are_symmetric():
    assert torch.allclose(bench.entry(FORWARD, RATIO), bench.entry(REVERSE, -RATIO))
    for divergence in (Divergence.JEFFREYS, Divergence.JSD):
        assert torch.allclose(bench.entry(divergence, RATIO), bench.entry(divergence, -RATIO))
    assert bench.entry(FORWARD, RATIO)[-1] < 1 < bench.entry(FORWARD, RATIO)[0]


def test_the_bounds_named_on_the_page_are_those_of_the_curves():
    sure = torch.tensor([64.0], dtype=torch.float64)
    page = (ROOT / "docs" / "method.md").read_text()
    assert f"here {bench.confidence(REVERSE, sure)[0].item():.2f} nats" in page
    assert f"or {4 * math.log(2):.2f} on this scale" in page
    assert bench.confidence(FORWARD, sure)[0] > 60
    assert bench.confidence(Divergence.JSD, sure)[1] < 1e-6 < bench.confidence(FORWARD, sure)[1]


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["dual_penalty.py", "--out", str(tmp_path)])
    bench.main()
    assert {x.name for x in tmp_path.iterdir()} == {"dual_penalty.png", "dual_penalty.svg"}
