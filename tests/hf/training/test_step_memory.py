"""Peak memory of a training step: models, loss, entropies, backward pass and optimizer together."""

import pytest
import torch

from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.hf import LensObjective
from lens_kernels.hf.training import entropy
from lens_kernels.lens import LensHead
from tests.support import tiny
from tests.support.memory import MIB, peak_bytes
from tests.support.training import tokens

VOCAB, LENGTH = 8192, 32
WORKSPACE = MIB // 2


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Run the pointwise pass without compilation, in blocks much smaller than other tensors."""
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", float("inf"))
    monkeypatch.setattr(pointwise_pass, "CPU_EAGER_BLOCK", 1 << 13)


def step_peak(rows):
    """Return the peak memory in bytes of a step with ``rows`` examples."""
    student, teacher = (
        tiny.model(layers=2, width=8, vocab=VOCAB, seed=seed, tie_word_embeddings=True)
        for seed in (1, 2)
    )
    goal = LensObjective(student, teacher, [1], [1], workspace_bytes=WORKSPACE)
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)
    ids = tokens(rows, LENGTH)

    def step():
        goal({"input_ids": ids, "labels": ids}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return peak_bytes(step)


def test_more_tokens_in_a_step_add_no_logits():
    few, more = step_peak(8), step_peak(24)
    # More tokens need memory for hidden states, but not for full logits. The bound is the memory of
    # the logits of every 16th token, from which entropies are computed.
    assert 0 < more - few < 16 * LENGTH * VOCAB * 4 / entropy.STRIDE


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tiles_of_the_entropies_fill_the_workspace(softcap):
    rows = torch.randn(2048, 8)
    head = LensHead(torch.randn(VOCAB, 8), torch.randn(VOCAB), softcap=softcap)
    peak = peak_bytes(lambda: entropy.entropy_sum(rows, head, 1.0, 4 * WORKSPACE))
    assert 0.4 * 4 * WORKSPACE < peak <= 4 * WORKSPACE
