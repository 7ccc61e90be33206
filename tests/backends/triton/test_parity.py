"""The ``triton`` and ``torch`` backends agree for every option and dtype.

Other tests compare the backends with the oracle in float32. These tests compare the two backends in
16 bits, under autocast, with an active vocabulary, and over chunks of any size.
"""

from dataclasses import replace

import pytest
import torch

from lens_kernels.backends.triton.tiles.sizes import ARCHS, Sweep, default
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, Shape
from tests.support.objectives import solve_objective
from tests.support.problems import make, objective, ours, with_few_active_entries

BACKENDS = ("torch", "triton")
HALF = (torch.float16, torch.bfloat16)
# The tolerances of each dtype: of the loss without a norm, of the loss with a norm, and of
# gradients. The norm's result and the logits' gradient are rounded to the dtype before a GEMM.
TOLERANCES = {
    torch.float32: (1e-6, 1e-6, 1e-5),
    torch.float16: (1e-5, 5e-4, 2e-3),
    torch.bfloat16: (1e-5, 4e-3, 2e-2),
}


def both(problem, **options):
    """Return ``(loss, gradients)`` of both backends, as a list."""
    return [ours(problem, backend=backend, **options) for backend in BACKENDS]


def compare(problem, dtype, normed, **options):
    exact, rounded, gradient = TOLERANCES[dtype]
    (expected, expected_grads), (loss, grads) = both(problem, **options)
    assert loss.dtype is expected.dtype
    assert_close(loss, expected, rounded if normed else exact, "loss")
    assert_gradients(grads, expected_grads, gradient)
    for name, grad in grads.items():
        assert grad.dtype is expected_grads[name].dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("feature", "divergence"),
    # tvd has no norm here. Rounding a norm's result would change the sign of p - q at some entries,
    # where the slope of tvd jumps.
    [*((feature, "jsd") for feature in FEATURES), *(("bias", d) for d in DIVERGENCES if d != "jsd")]
    + [("everything", "jeffreys")],
)
def test_16_bit_with_all_options_of_a_call(feature, divergence, dtype):
    """The call has a mask, a vocabulary prefix, two weighted pairs, two hidden sizes and a sum."""
    problem = make(BATCH, std=2.0, **FEATURES[feature], divergence=divergence).to(dtype)
    options = {
        "mask": torch.rand(BATCH.leading) < 0.5,
        "vocab_size": 90,
        "layer_weights": [0.3, 1.2],
        "reduction": "sum",
        "beta": 0.3,
    }
    compare(problem, dtype, "norm" in FEATURES[feature], **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("feature", ["bias", "everything"])
def test_autocast(feature, dtype):
    problem = make(BATCH, std=2.0, **FEATURES[feature])
    with torch.autocast("cpu", dtype):
        compare(problem, dtype, "norm" in FEATURES[feature])
    (_, plain), (loss, grads) = both(problem)
    with torch.autocast("cpu", dtype):
        cast, cast_grads = ours(problem, backend="triton")
    assert loss != cast and not torch.equal(grads["weight"], cast_grads["weight"])


@pytest.mark.parametrize("rounded", ["bias", "norm"])
def test_a_float32_bias_or_norm_on_a_16_bit_head(rounded):
    """Some models have a 16-bit head with a float32 bias or norm."""
    problem = make(BATCH, std=2.0, bias=True, norm="layer", norm_bias=True)
    half = problem.to(torch.bfloat16)
    for side in ("student_head", "teacher_head"):
        head, wide = getattr(half, side), getattr(problem, side)
        part = {"bias": head.bias} if rounded == "bias" else {"norm": head.norm}
        setattr(half, side, replace(wide, weight=head.weight, **part))
    compare(half, torch.bfloat16, normed=True)


ACTIVE = Shape((24,), 400, 16, 16, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 1e-5, 1e-4, 1e-3, 1e3])
def test_the_active_vocabulary_of_one_chunk(always_active, threshold, masked):
    """With several chunks, the backends may skip different entries.

    The torch backend chooses entries for each chunk of tokens, and the triton backend for each
    chunk of the vocabulary.
    """
    problem = with_few_active_entries(ACTIVE)
    options = {"final_divergence": "jsd", "grad_threshold": threshold}
    options["mask"] = torch.rand(24) < 0.7 if masked else None
    (expected, expected_grads), (got, grads) = (
        solve_objective(problem, backend=backend, **options) for backend in BACKENDS
    )
    assert_close(got.loss, expected.loss, 1e-6)
    if threshold == 0.0:
        # The share is not exactly 0, because some gradients are 0 in one backend and 1e-12 in the
        # other.
        assert abs(got.dropped) < 1e-6 and abs(expected.dropped) < 1e-6
    else:
        assert_close(got.dropped, expected.dropped, 1e-4, "dropped")
        assert 0 < got.dropped <= 1
    if threshold == 1e3:
        # All entries are skipped here, and the mean head row replaces all rows. It adds 0, because
        # each row of the gradient sums to 0.
        assert got.dropped == 1 and not grads["weight"].any()
        assert grads["hidden0"].abs().max() < 1e-6
        return
    same = grads["weight"].any(1) == expected_grads["weight"].any(1)
    assert threshold == 0.0 or bool(same.all())
    assert_gradients(grads, expected_grads, 1e-5)


def test_the_threshold_of_float16(always_active):
    """The kernels multiply float16 gradients by a constant against underflow.

    They must multiply the threshold by the same constant.
    """
    problem = with_few_active_entries(ACTIVE).to(torch.float16)
    options = {"final_divergence": "jsd", "grad_threshold": 1e-4}
    expected, dropped = (objective(problem, **options, backend=x).dropped for x in BACKENDS)
    assert 0 < expected < 1
    assert_close(dropped, expected, 0.01)


def test_several_chunks_of_active_vocabulary_give_a_close_gradient(always_active):
    """With one chunk for each tile, skipping entries changes the gradient by at most 0.1 %.

    Each chunk replaces the head rows that it skips by their mean.
    """
    problem = with_few_active_entries(ACTIVE)
    _, exact = ours(problem, backend="triton")
    one_tile = {"backend": "triton", "workspace_bytes": 1}
    loss, grads = ours(problem, grad_threshold=1e-5, **one_tile)
    assert torch.equal(loss, ours(problem, **one_tile)[0])
    for name, grad in grads.items():
        assert not torch.equal(grad, exact[name])
        assert (grad - exact[name]).norm() <= 1e-3 * exact[name].norm()


def test_chunks_of_any_size():
    """Chunks of one to four tiles give the same result as a single chunk of seven tiles."""
    problem = make(Shape((20,), 840, 24, 40, 2), **FEATURES["everything"])
    tile = default(Sweep.GRADIENTS, ARCHS["interpreter"], torch.float32, 24)
    assert tile.block_v == 128
    options = {"labels": torch.randint(840, (20,)), "kd_ratio": 0.5, "backend": "triton"}
    whole, grads = solve_objective(problem, **options)
    one_tile = 20 * tile.block_v * 4
    for room in (1, 3 * one_tile - 1, 3 * one_tile, 7 * one_tile - 1):
        again, grads_again = solve_objective(problem, workspace_bytes=room, **options)
        assert torch.equal(again.loss, whole.loss)
        assert_gradients(grads_again, grads, 1e-6)
