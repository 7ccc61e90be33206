"""The ``grad_threshold`` option: which vocabulary entries and how much of the gradient it skips."""

from __future__ import annotations

import pytest
import torch

from lens_kernels import LensHead, distillation_loss, symmetric_lens_loss
from lens_kernels.backends import head_products
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.backends.torch.layout import row_stride
from tests.support.grids import Shape
from tests.support.problems import with_few_active_entries

N, V, D = 24, 600, 16


def problem():
    made = with_few_active_entries(Shape((N,), V, D, D, 1))
    heads = made.student_head.weight, made.teacher_head.weight
    return made.student_hidden[0], made.teacher_hidden[0], *heads


def gradients(threshold, student, teacher, head, teacher_head, **options):
    loss = symmetric_lens_loss(
        student, teacher, head, teacher_head, grad_threshold=threshold, **options
    )
    weight = head.weight if isinstance(head, LensHead) else head
    return loss.detach(), *torch.autograd.grad(loss, [student, weight])


def final(threshold, student, teacher, head, teacher_head, **options):
    """Return the share of skipped entries and the gradients, for a jsd of final states alone."""
    finals = {"student_final": student, "teacher_final": teacher, "final_divergence": "jsd"}
    options |= {"grad_threshold": threshold}
    out = distillation_loss([], [], head, teacher_head, **finals, **options)
    return out.dropped, *torch.autograd.grad(out.loss, [student, head])


def logit_gradients(student, teacher, head, teacher_head):
    """Return the gradient of the summed loss with respect to the student's logits."""
    z = (student @ head.T).detach().double().requires_grad_()
    q, p = z.softmax(-1), (teacher @ teacher_head.T).double().softmax(-1)
    m = (p + q) / 2
    loss = (p * (p / m).log() + q * (q / m).log()).sum() / 2
    return torch.autograd.grad(loss, z)[0]


def assert_near(results, truths, tolerance):
    for a, b in zip(results, truths, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() and b.abs().max() > 0


def test_threshold_zero_is_exact():
    inputs = problem()
    exact, approximate = gradients(None, *inputs), gradients(0.0, *inputs)
    assert exact[0] == approximate[0]
    assert_near(approximate[1:], exact[1:], 1e-6)


@pytest.mark.parametrize("tile", [7, 3072])
@pytest.mark.parametrize("weight", [1.0, 1e-4])
def test_columns_above_the_threshold_are_used_at_any_token_weight(
    always_active, monkeypatch, weight, tile
):
    monkeypatch.setattr(head_products, "CPU_ACTIVE_TILE", tile)
    inputs, threshold = problem(), 1e-4
    g = logit_gradients(*inputs)
    used = g.abs().amax(0) > threshold
    assert 0.05 < used.double().mean() < 0.6
    options = {"reduction": "sum", "layer_weights": [weight]}
    loss, d_student, d_head = gradients(threshold, *inputs, **options)
    exact = gradients(None, *inputs, **options)
    assert loss == exact[0]
    assert (d_head[~used] == 0).all()
    error = (d_head[used] - exact[2][used]).abs().max()
    assert error <= 1e-5 * exact[2].abs().max()
    # In the hidden gradient, the mean of all skipped head rows replaces each skipped row.
    head = inputs[2].detach().double()
    rest = torch.outer(g[:, ~used].sum(1), head[~used].mean(0))
    expected = weight * (g[:, used] @ head[used] + rest)
    assert (d_student - expected).abs().max() <= 1e-5 * expected.abs().max()
    bare = weight * (g[:, used] @ head[used])
    assert (d_student - exact[1]).norm() < 0.7 * (bare - exact[1]).norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("scale", "temperature"), [(1 / 64, 10.0), (4.0, 0.5)])
def test_the_threshold_applies_to_the_logits_gradient_at_any_scale(
    always_active, backend, scale, temperature
):
    """At scale 1/64 and temperature 10, gradients of the GEMM's result are 640 times smaller."""
    student, teacher, weight, teacher_weight = problem()
    with torch.no_grad():
        weight *= temperature / scale
        teacher_weight *= temperature / scale
    heads = LensHead(weight, scale=scale), LensHead(teacher_weight, scale=scale)
    options = {"temperature": temperature, "reduction": "sum", "backend": backend}
    factor = scale / temperature
    g = logit_gradients(student, teacher, factor * weight, factor * teacher_weight)
    exact = gradients(None, student, teacher, *heads, **options)[2]
    threshold = 1e-4
    used = g.abs().amax(0) > threshold
    assert 0.05 < used.double().mean() < 0.6
    d_head = gradients(threshold, student, teacher, *heads, **options)[2]
    assert (d_head[~used] == 0).all()
    assert (d_head[used] - exact[used]).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_threshold_of_labels_does_not_depend_on_the_temperature(always_active, backend):
    student, _, head, _ = problem()
    options = {"labels": torch.randint(V, (N,)), "kd_ratio": 0.0, "grad_threshold": 1e-4}
    options |= {"student_final": student, "teacher_final": None, "backend": backend}
    results = []
    for temperature in (1.0, 10.0):
        out = distillation_loss([], None, head, None, temperature=temperature, **options)
        results.append((out.dropped, *torch.autograd.grad(out.loss, [student, head])))
    assert 0 < results[0][0] < 1
    assert_near(*results, 1e-5)


def test_the_dropped_share_is_reported(always_active):
    inputs = problem()
    g = logit_gradients(*inputs)
    assert final(None, *inputs)[0] == 0.0
    for threshold in (1e-5, 1e-4, 1e-3):
        left_out = g.abs().amax(0) <= threshold
        expected = (g[:, left_out].abs().sum() / g.abs().sum()).item()
        dropped = final(threshold, *inputs)[0].item()
        assert dropped == pytest.approx(expected, rel=1e-2) and expected > 0
    assert final(1e3, *inputs)[0] == 1.0


def test_dropping_every_entry_is_finite_with_chunks_and_masks(always_active):
    inputs = problem()
    mask = torch.rand(N) > 0.5
    _, d_student, d_head = gradients(1e3, *inputs, mask=mask, workspace_bytes=5 * 8 * row_stride(V))
    assert (d_head == 0).all() and d_student.isfinite().all()
    assert (d_student[~mask] == 0).all()
    exact = gradients(None, *inputs, mask=mask)
    near = gradients(1e-6, *inputs, mask=mask, workspace_bytes=5 * 8 * row_stride(V))
    for a, b in zip(exact[1:], near[1:], strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm()


def test_per_token_losses_use_the_threshold_in_the_backward_pass():
    student, teacher, head, teacher_head = problem()
    rows = symmetric_lens_loss(
        student, teacher, head, teacher_head, reduction="none", grad_threshold=1e3
    )
    assert (torch.autograd.grad(rows.sum(), head)[0] == 0).all()


def test_torch_compile_takes_a_threshold(always_active):
    student, teacher, head, teacher_head = problem()
    compiled = torch.compile(
        lambda: symmetric_lens_loss(
            student, teacher, LensHead(head), teacher_head, grad_threshold=1e-4
        ),
        fullgraph=True,
    )
    a = torch.autograd.grad(compiled(), [student, head])
    b = gradients(1e-4, student, teacher, head, teacher_head)[1:]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_entries_with_a_nan_gradient_are_kept():
    student, teacher, head, teacher_head = problem()
    student = student.detach().clone()
    student[0, 0] = float("nan")
    _, d_student, d_head = gradients(1e-4, student.requires_grad_(), teacher, head, teacher_head)
    assert d_student[0].isnan().all() and d_head.isnan().any()


@pytest.mark.parametrize("threshold", [1e-4, "bf16"])
def test_statistics_cover_all_blocks_of_the_pointwise_pass(always_active, monkeypatch, threshold):
    inputs = problem()
    whole = final(threshold, *inputs, backend="torch")
    assert whole[0] > 0
    # A block has at most 5 rows here, so 24 rows make five blocks.
    monkeypatch.setattr(pointwise_pass, "CPU_EAGER_BLOCK", 5 * V)
    assert_near(final(threshold, *inputs, backend="torch"), whole, 1e-5)


@pytest.mark.parametrize(("share", "above"), [(0.6, False), (0.75, True)])
def test_all_entries_are_used_if_most_are_active(share, above):
    inputs = problem()
    threshold = logit_gradients(*inputs).abs().amax(0).quantile(1 - share).item()
    dropped, *found = final(threshold, *inputs)
    assert (dropped == 0) == above
    for a, b in zip(found, final(None, *inputs)[1:], strict=True):
        assert torch.equal(a, b) == above


@pytest.mark.parametrize("gap", [0.3, 1e-2])
@pytest.mark.parametrize("rows", [N, 7])
def test_a_preset_is_relative_to_the_gradient(always_active, gap, rows):
    """Near convergence, gradients are small, and a fixed threshold would skip every entry."""
    student, _, head, teacher_head = problem()
    teacher = student.detach() + gap * torch.randn(N, D)
    inputs = student, teacher, head, teacher_head
    g = logit_gradients(*inputs)
    expected = torch.zeros(V, D, dtype=torch.float64)
    for chunk in torch.arange(N).split(-(-N // -(-N // rows))):
        used = g[chunk].abs().amax(0) > 2.0**-9 * g[chunk].square().mean().sqrt()
        assert 0.02 < used.double().mean() < 0.98
        expected[used] += g[chunk][:, used].T @ student[chunk].detach().double()
    options = {"reduction": "sum", "workspace_bytes": rows * 8 * row_stride(V)}
    _, d_student, d_head = gradients("bf16", *inputs, **options)
    assert (d_head - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ((d_head == 0).all(1) == (expected == 0).all(1)).all()
    exact = gradients(None, *inputs, **options)[1:]
    for a, b in zip((d_student, d_head), exact, strict=True):
        rounding = (b.bfloat16().float() - b).norm()
        assert 0 < (a - b).norm() < rounding


@pytest.mark.parametrize("large", [float("inf"), 1e25])
def test_an_infinite_norm_keeps_every_entry(large):
    """In float32, the square of 1e25 is infinite."""
    grad_stats = head_products.ColumnStatistics()
    grad_stats.add(torch.tensor([[large, 1.0, 0.0]]))
    assert grad_stats.active(2.0**-9, relative=True).tolist() == [0, 1, 2]
    assert grad_stats.active(0.5, relative=False).tolist() == [0, 1]


def test_the_threshold_uses_token_weights_relative_to_the_largest(always_active):
    student, teacher, head, teacher_head = problem()
    other = student.detach().clone().requires_grad_()
    light, threshold = 1e-2, 1e-4
    loss = symmetric_lens_loss(
        [student, other],
        [teacher, teacher],
        head,
        teacher_head,
        reduction="sum",
        layer_weights=[1.0, light],
        grad_threshold=threshold,
    )
    g = logit_gradients(student, teacher, head, teacher_head)
    rows = head.detach().double()
    grads = torch.autograd.grad(loss, [student, other])
    shares = []
    for grad, weight in zip(grads, (1.0, light), strict=True):
        used = weight * g.abs().amax(0) > threshold
        shares.append(used.double().mean())
        rest = torch.outer(g[:, ~used].sum(1), rows[~used].mean(0))
        expected = weight * (g[:, used] @ rows[used] + rest)
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert shares[0] > 2 * shares[1] > 0
