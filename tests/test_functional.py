"""Every backend agrees with the float64 oracle: losses and all gradients, for each option."""

import math

import pytest
import torch

from lens_kernels import LensHead, symmetric_lens_loss
from lens_kernels.backends.torch.layout import row_stride
from reference import dense
from tests.support import gpu_checks
from tests.support.compare import LOSS, assert_close, assert_gradients
from tests.support.gpu_checks import CPU
from tests.support.grids import (
    BATCH,
    DIVERGENCES,
    FEATURES,
    ODD,
    SHAPES,
    WITH_SLOW_ROW_KERNEL,
    Shape,
    several_chunks,
)
from tests.support.problems import (
    check,
    check_beside,
    loss_of,
    make,
    oracle,
    ours,
    plain_torch,
    related,
    without_columns,
)

pytestmark = pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_of_every_divergence_over_several_chunks(backend, feature, divergence):
    problem = make(BATCH, std=2.0, **FEATURES[feature], divergence=divergence)
    check(problem, backend=backend, workspace_bytes=several_chunks(BATCH))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(backend, shape, divergence):
    check(make(SHAPES[shape], bias=True, divergence=divergence), backend=backend)


@pytest.mark.parametrize("rows", [0, 1, 4, 36, 37, 38])
def test_chunks_of_any_size_give_the_same_numbers(backend, rows):
    """Chunks hold less than one row, one row, or up to all 37 rows.

    With 4 and 36 rows, the last chunk has one row.
    """
    problem = make(ODD, **FEATURES["everything"])
    check(problem, backend=backend, workspace_bytes=several_chunks(ODD, rows) or 1)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6])
def test_beta_is_the_weight_of_the_teacher(backend, beta):
    """At the extremes, the mixture differs from one distribution by 1e-6.

    The jsd is still accurate.
    """
    check(make(ODD, std=2.0), backend=backend, beta=beta)
    check(related(ODD, 2.0), 1e-5, backend=backend, beta=beta)


@pytest.mark.parametrize("narrow", ["hidden", "head"])
def test_hidden_states_and_heads_of_different_dtypes(backend, narrow):
    problem = make(ODD, std=2.0).to(torch.bfloat16, narrow)
    rounded = problem
    # The Triton kernels round hidden states to the head's dtype.
    if narrow == "head" and backend == "triton":
        rounded = problem.to(torch.bfloat16)
    _, grads = check(problem, 1e-5, 1e-2, truth=rounded, backend=backend)
    for name, grad in grads.items():
        assert grad.dtype is problem.leaves()[name].dtype


INFINITE = {
    # Each key names the model that gives some entries the probability 0. Its value lists the
    # divergences that are then infinite.
    "teacher": ("reverse_kl", "jeffreys"),
    "student": ("forward_kl", "jeffreys"),
    "both": (),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", INFINITE)
def test_divergences_are_infinite_only_where_the_formula_is(backend, side, divergence):
    """One entry of the kernel's first tile and all entries of its last tile have probability 0."""
    vocab = 211
    problem = make(Shape((9,), vocab, 8, 12, 1), bias=True, divergence=divergence)
    gone = torch.zeros(vocab, dtype=torch.bool)
    gone[3] = True
    gone[130:] = True
    with torch.no_grad():
        for name in ("student", "teacher") if side == "both" else (side,):
            getattr(problem, f"{name}_head").bias[gone] = -math.inf
    loss, grads = ours(problem, backend=backend)
    if divergence in INFINITE[side]:
        assert loss == math.inf
        # If only the student gives entries the probability 0, its logits are constant at -inf, so
        # the gradient is finite.
        assert bool(grads["hidden0"].isfinite().all()) is (side == "student")
        return
    wide = problem.to(torch.float64)
    hidden = wide.teacher_hidden[0], wide.student_hidden[0]
    heads = wide.teacher_head, wide.student_head
    logits = (dense.lens_logits(h, head, True, None) for h, head in zip(hidden, heads, strict=True))
    p, q = map(dense.softmax, logits)
    assert_close(loss, dense.divergence(divergence, p.detach(), q).mean(), 1e-6, "loss")
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert bool(grads["hidden0"].any())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
def test_no_mass_beside_a_mass_that_underflows_is_finite(backend, divergence):
    """A probability of exp(-300) underflows to 0, but does not make a divergence infinite.

    The other model has a logit of -inf at this entry.
    """
    problem = make(ODD, bias=True, divergence=divergence)
    with torch.no_grad():
        for head in problem.args()[2:]:
            head.bias[3:5] = -math.inf
    expected, expected_grads = ours(problem, backend=backend)
    with torch.no_grad():
        problem.student_head.bias[3] = problem.teacher_head.bias[4] = -300.0
    loss, grads = ours(problem, backend=backend)
    assert_close(loss, expected, LOSS)
    assert_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("std", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_do_not_round_the_logits(backend, dtype, divergence, std):
    """The loss is as exact as for float32 inputs: only the final gradients are rounded to 16 bits.

    At std 30, the float32 rounding of the GEMM dominates the error of the loss. The limit is then
    relative to the error of float32 torch.
    """
    problem = related(ODD, std, bias=True, divergence=divergence).to(dtype)
    truth = oracle(problem)
    loss, grads = ours(problem, backend=backend, workspace_bytes=several_chunks(ODD))
    assert loss.dtype is torch.float32 and all(grad.dtype is dtype for grad in grads.values())
    assert_gradients(grads, truth[1], 1e-2)
    fp32_loss, _ = plain_torch(problem.to(torch.float32))
    _, rounded = plain_torch(problem)
    check_beside(
        (fp32_loss, rounded),
        (loss, grads),
        truth,
        lambda error: 1e-5 if std < 30 else max(1e-5, 2 * error),
        lambda error: error + 1e-3,
    )


@pytest.mark.parametrize("std", [10.0, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_peaked_distributions(backend, divergence, std):
    gpu_checks.peaked(CPU, backend, divergence, std, ODD)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float16])
def test_masks_differ_per_sample(backend, dtype, reduction):
    mask = torch.rand(BATCH.leading) < 0.5
    assert len({tuple(row.tolist()) for row in mask}) == BATCH.leading[0]
    options = {"mask": mask.to(dtype), "reduction": reduction, "backend": backend}
    problem = make(BATCH, **FEATURES["everything"])
    check(problem, workspace_bytes=several_chunks(BATCH, 3), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_masked_rows_have_no_effect(backend, garbage, reduction):
    clean = make(BATCH, norm="rms", bias=True)
    mask = torch.rand(BATCH.leading) < 0.6
    options = dict(mask=mask, backend=backend, reduction=reduction)
    upstream = torch.rand(BATCH.pairs, *BATCH.leading) if reduction == "none" else None
    loss, grads = ours(clean, upstream=upstream, **options)
    dirty_loss, dirty = ours(clean.spoil(~mask, garbage), upstream=upstream, **options)
    assert torch.equal(dirty_loss, loss)
    for name, grad in grads.items():
        assert bool(grad.any()) and torch.equal(dirty[name], grad), name
    assert not any(dirty[f"hidden{i}"][~mask].any() for i in range(BATCH.pairs))
    assert reduction != "none" or not dirty_loss[:, ~mask].any()


def test_masked_rows_have_no_effect_under_an_infinite_upstream_gradient(backend):
    """The test takes square roots of losses.

    A masked row has loss 0, where the root has an infinite slope.
    """
    problem = make(BATCH)
    mask = torch.rand(BATCH.leading) < 0.6
    rows = loss_of(symmetric_lens_loss, problem, mask=mask, reduction="none", backend=backend)
    grads = problem.gradients(rows.sqrt().sum())
    expected = loss_of(symmetric_lens_loss, problem, reduction="none", backend=backend)
    truth = problem.gradients(expected[:, mask].sqrt().sum())
    assert_gradients(grads, truth, 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("nothing", ["all masked", "denominator of 0", "no tokens"])
def test_no_token_gives_zero_loss_and_gradients(backend, nothing, reduction):
    leading = (0,) if nothing == "no tokens" else (5, 7)
    options = {"reduction": reduction, "backend": backend}
    if nothing != "no tokens":
        options["mask"] = torch.zeros(leading)
    if nothing == "denominator of 0":
        options |= {"reduction": "mean", "denominator": torch.tensor(0)}
    problem = make(Shape(leading, 31, 8, 9, 2), **FEATURES["everything"])
    loss = loss_of(symmetric_lens_loss, problem, **options)
    assert loss.shape == ((2, *leading) if options["reduction"] == "none" else ())
    assert not loss.any() and loss.requires_grad
    for name, grad in problem.gradients(loss.sum()).items():
        assert grad.shape == problem.leaves()[name].shape and not grad.any()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_reduction_none_weights_each_row_by_its_upstream_gradient(backend, feature, mask):
    problem = make(BATCH, std=2.0, **FEATURES[feature])
    options = {"reduction": "none", "mask": torch.rand(BATCH.leading) < 0.5 if mask else None}
    options |= {"backend": backend, "workspace_bytes": several_chunks(BATCH)}
    rows, _ = check(problem, upstream=torch.randn(BATCH.pairs, *BATCH.leading), **options)
    assert rows.shape == (BATCH.pairs, *BATCH.leading) and rows.dtype is torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_layer_weights(backend, reduction, kind):
    problem = make(BATCH)
    check(problem, backend=backend, reduction=reduction, layer_weights=kind([0.2, 1.5]))
    check(problem, backend=backend, reduction=reduction, layer_weights=kind([-1.0, 0.5]))
    check(problem, backend=backend, layer_weights=kind([0.0, 1.0]), zero=("hidden0",))


@pytest.mark.parametrize("make_denominator", [float, int, lambda n: torch.tensor([n])])
def test_micro_batches_accumulate_to_the_whole_batch(backend, make_denominator):
    """The losses of micro-batches add up to the loss of the whole batch, if they share its
    denominator.

    The micro-batches have unequal numbers of tokens, and one of them has none.
    """
    problem = make(BATCH, norm="rms", bias=True)
    mask = torch.rand(BATCH.leading) < 0.5
    mask[3] = False
    expected, expected_grads = oracle(problem, mask=mask)
    options = {"denominator": make_denominator(int(mask.sum())), "backend": backend}
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)):
        hidden = ([h[part] for h in side] for side in problem.args()[:2])
        heads = problem.args()[2:]
        total = total + symmetric_lens_loss(*hidden, *heads, mask=mask[part], **options)
    assert_close(total, expected, LOSS)
    assert_gradients(problem.gradients(total), expected_grads, 1e-5)


@pytest.mark.parametrize("denominator", [0.5, torch.tensor(0.5)])
def test_a_denominator_below_one_is_not_clamped(backend, denominator):
    """A few tokens divided by the number of processes may be less than one."""
    check(make(ODD), denominator=denominator, backend=backend)


@pytest.mark.parametrize("vocab", [(97, 97), (97, 120), (120, 97)])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_vocabulary_prefix(backend, feature, vocab):
    prefix, shape = 90, Shape(BATCH.leading, 120, BATCH.student, BATCH.teacher, BATCH.pairs)
    problem = make(shape, **FEATURES[feature])
    problem.student_head, problem.teacher_head = (
        head.prefix(size) for head, size in zip(problem.args()[2:], vocab, strict=True)
    )
    room = {"workspace_bytes": several_chunks(BATCH)}
    _, grads = check(problem, backend=backend, vocab_size=prefix, **room)
    assert not grads["weight"][prefix:].any() and bool(grads["weight"][prefix - 1].any())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_divergence_and_gradient_exactly_zero(backend, divergence):
    gpu_checks.identical(CPU, backend, torch.float32, divergence, ODD)


def test_self_distillation_gives_the_tied_head_the_student_s_gradient_alone(backend):
    problem = make(ODD, norm="rms")
    problem.teacher_hidden = [torch.randn(*ODD.leading, ODD.student)]
    problem.teacher_head = problem.student_head
    check(problem, backend=backend)


@pytest.mark.parametrize(
    ("divergence", "value"),
    [("jsd", math.log(2)), ("tvd", 1.0), ("hellinger", 1.0)],
)
def test_disjoint_models_reach_the_upper_bound(backend, divergence, value):
    eye = 100 * torch.eye(6)
    student, teacher = eye[:3].clone().requires_grad_(), eye[3:]
    loss = symmetric_lens_loss(
        student, teacher, torch.eye(6), torch.eye(6), divergence=divergence, backend=backend
    )
    assert loss.item() == pytest.approx(value, rel=1e-6)
    loss.backward()
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_log_probabilities_near_minus_120_are_finite_and_right(backend, divergence):
    """In float32 the probability e^-120 is 0, and 0 log 0 would be NaN."""
    vocab = 531
    z_s, z_t = torch.randn(2, 2, 5, vocab) - 120
    z_s[..., 7], z_t[..., 7] = 0.0, 0.0
    z_s[..., 9], z_t[..., 9] = torch.randn(2, 5), torch.randn(2, 5)
    problem = make(ODD)
    problem.student_hidden, problem.teacher_hidden = [z_s.requires_grad_()], [z_t]
    eye = torch.eye(vocab)
    problem.student_head, problem.teacher_head = LensHead(eye), LensHead(eye)
    problem.options = {"divergence": divergence}
    check(problem, backend=backend, workspace_bytes=2 * 8 * row_stride(vocab))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_at_minus_infinity_in_both_models_are_ignored(backend, divergence):
    """Removing columns that are -inf in both models does not change the result."""
    features = {"bias": True, "norm": "layer", "temperature": 1.5, "divergence": divergence}
    closed = torch.zeros(BATCH.vocab, dtype=torch.bool)
    closed[[0, 13, 14, BATCH.vocab - 1]] = True
    problem, truth = without_columns(make(BATCH, std=2.0, **features), closed)
    loss, grads = ours(problem, backend=backend, workspace_bytes=several_chunks(BATCH))
    expected, expected_grads = oracle(truth)
    assert_close(loss, expected, LOSS)
    for name in ("weight", "bias"):
        assert not grads[name][closed].any()
        grads[name] = grads[name][~closed]
    assert_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_convergence_the_loss_keeps_its_digits_and_its_sign(backend, divergence):
    """A formula with cancellation would lose all digits in float32."""
    gpu_checks.near_convergence(CPU, backend, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_is_negative(backend, divergence, dtype):
    """The models are almost equal, unrelated, or between these cases."""
    problem = make(ODD, std=3.0, divergence=divergence)
    problem.teacher_head = LensHead(problem.student_head.weight.detach())
    for distance in (1e-7, 1e-5, 1e-3, 1e-1, 10.0):
        student = problem.student_hidden[0]
        problem.teacher_hidden = [(student + distance * torch.randn_like(student)).detach()]
        rows = loss_of(symmetric_lens_loss, problem.to(dtype), reduction="none", backend=backend)
        assert rows.min() >= -1e-12
