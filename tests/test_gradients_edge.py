"""Gradients in unusual cases: frozen tensors, repeated or scaled backward passes, odd layouts."""

import itertools

import pytest
import torch

from lens_kernels import LensHead, symmetric_lens_loss
from lens_kernels.backends.torch import row_chunks
from reference import dense
from tests.support.compare import assert_close
from tests.support.grids import BATCH, FEATURES, ODD, WITH_SLOW_ROW_KERNEL, Shape, several_chunks
from tests.support.operators import Products
from tests.support.problems import capture_call, check, loss_of, make, oracle, ours

LEAVES = ["hidden0", "hidden1", "weight", "bias", "norm_weight", "norm_bias"]
SUBSETS = [set(s) for n in (1, 2, 5, 6) for s in itertools.combinations(LEAVES, n)]


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_sides_in_every_combination(backend, reduction):
    """Frozen tensors get no gradient, and do not change the gradients of other tensors."""
    # The test makes 56 calls, so the shape is small enough for one tile.
    shape = Shape((3, 4), 61, 33, 17, 2)
    problem = make(shape, **FEATURES["everything"])
    upstream = torch.rand(2, *shape.leading) if reduction == "none" else None
    options = {"reduction": reduction, "backend": backend, "upstream": upstream}
    loss, grads = ours(problem, **options)
    assert set(grads) == set(LEAVES)
    for wanted in SUBSETS:
        part, part_grads = ours(problem.freeze(*wanted), **options)
        assert torch.equal(part, loss) and set(part_grads) == wanted
        for name in wanted:
            assert_close(part_grads[name], grads[name], 1e-6, f"{name} of {sorted(wanted)}")


@pytest.mark.parametrize(
    ("wanted", "student_products"),
    [
        # Each number counts the student's GEMMs for two pairs: two GEMMs compute logits, and the
        # others gradients.
        ((), 2),
        (("bias",), 2),
        (("hidden1",), 3),
        (("hidden0", "hidden1"), 4),
        (("weight",), 4),
        (("norm_weight",), 4),
        (("norm_bias",), 4),
        (("hidden0", "hidden1", "norm_weight", "norm_bias"), 4),
        (LEAVES, 6),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, (tuple, list)) else str(x),
)
@pytest.mark.parametrize("masked", [False, True])
def test_only_the_required_gradients_cost_work(monkeypatch, wanted, student_products, masked):
    problem = make(BATCH, **FEATURES["everything"]).freeze(*wanted)
    mask = torch.rand(BATCH.leading) < 0.5 if masked else None
    tokens = int(mask.sum()) if masked else BATCH.tokens
    call = capture_call(monkeypatch, problem, mask=mask, workspace_bytes=several_chunks(BATCH))
    with Products() as products, torch.no_grad():
        result = row_chunks.evaluate(call)
    assert len(result.grads) == len(wanted)
    pairs = student_products * BATCH.student + BATCH.pairs * BATCH.teacher
    assert products.flops == 2 * tokens * BATCH.vocab * pairs


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_work_without_grad_mode(monkeypatch, context, reduction):
    problem = make(BATCH, norm="rms")
    expected = loss_of(symmetric_lens_loss, problem, reduction=reduction)
    with context():
        call = capture_call(monkeypatch, problem, reduction=reduction)
        assert call.needs_grad == [False] * len(problem.leaves())
        loss = loss_of(symmetric_lens_loss, problem, reduction=reduction)
    assert not loss.requires_grad and torch.equal(loss, expected)


def test_losses_by_token_do_no_gradient_work_in_the_forward_pass(monkeypatch):
    call = capture_call(monkeypatch, make(BATCH), reduction="none")
    assert call.needs_grad == [True] * 3 and not call.needing_grad()


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_teacher_never_gets_a_gradient(backend, reduction):
    problem = make(BATCH, norm="rms", bias=True)
    teacher = problem.teacher_hidden + list(problem.teacher_head.tensors().values())
    for x in teacher:
        x.requires_grad_()
    loss = loss_of(symmetric_lens_loss, problem, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in problem.leaves().values())
    problem.freeze()
    loss = loss_of(symmetric_lens_loss, problem, reduction=reduction, backend=backend)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_backward_gives_the_same(reduction):
    problem = make(BATCH, **FEATURES["everything"])
    loss = loss_of(symmetric_lens_loss, problem, reduction=reduction)
    upstream = torch.rand(loss.shape) + 1
    first = problem.gradients(loss, grad_outputs=upstream, retain_graph=True)
    kept = {name: g.clone() for name, g in first.items()}
    second = problem.gradients(loss, grad_outputs=upstream, retain_graph=True)
    doubled = problem.gradients(loss, grad_outputs=2 * upstream)
    for name, grad in kept.items():
        assert torch.equal(first[name], grad) and torch.equal(second[name], grad)
        assert torch.equal(doubled[name], 2 * grad)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("upstream", [3.0, -0.25, 1e-6])
def test_a_scalar_upstream_gradient_scales(backend, upstream):
    check(make(ODD, bias=True), upstream=torch.tensor(upstream), backend=backend)


def test_an_upstream_gradient_of_zero_gives_zeros():
    problem = make(ODD, bias=True)
    loss = loss_of(symmetric_lens_loss, problem)
    assert not any(g.any() for g in problem.gradients(0.0 * loss).values())


def test_one_row_s_upstream_gradient_reaches_that_row_alone():
    problem = make(BATCH)
    rows = loss_of(symmetric_lens_loss, problem, reduction="none")
    grads = problem.gradients(rows[1, 2, 3])
    assert not grads["hidden0"].any()
    only = torch.zeros(BATCH.leading, dtype=torch.bool)
    only[2, 3] = True
    assert torch.equal(grads["hidden1"].ne(0).any(-1), only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_layer_weights_receive_their_gradient(reduction, dtype):
    """The gradient of a layer weight is the loss of its lens pair."""
    problem = make(BATCH)
    weights = torch.tensor([0.5, 2.0], dtype=dtype, requires_grad=True)
    mask = torch.rand(BATCH.leading) < 0.5
    loss = loss_of(
        symmetric_lens_loss, problem, layer_weights=weights, mask=mask, reduction=reduction
    )
    (3 * loss).backward()
    rows, _ = oracle(problem, mask=mask, reduction="none")
    expected = 3 * rows.flatten(1).sum(1) / (mask.sum() if reduction == "mean" else 1)
    assert weights.grad.dtype is dtype
    assert_close(weights.grad, expected, 1e-6 if dtype is not torch.bfloat16 else 4e-3)
    # A loss whose only trainable tensor is the layer weights also has a backward pass.
    loss_of(symmetric_lens_loss, problem.freeze(), layer_weights=weights).backward()


@pytest.mark.parametrize(
    ("of", "reduction"),
    [*itertools.product(["hidden0", "weight"], ["mean", "none"]), ("layer_weights", "mean")],
)
@pytest.mark.parametrize("keep", [True, False])
def test_double_backward_is_refused_clearly(of, reduction, keep):
    problem = make(BATCH, norm="rms")
    options = {"reduction": reduction}
    wanted = problem.leaves()
    if of == "layer_weights":
        wanted[of] = options["layer_weights"] = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = loss_of(symmetric_lens_loss, problem, **options).sum()
    (grad,) = torch.autograd.grad(loss, wanted[of], create_graph=True, retain_graph=keep)
    with pytest.raises(RuntimeError, match="derivatives only.*compute the loss from full logits"):
        # The square could be differentiated twice, so the error can only come from our operator.
        (grad.sum() + problem.student_hidden[0].square().sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_made_in_inference_mode(reduction):
    """The deferred backward pass needs the teacher's tensors, although autograd refuses to save
    them."""
    problem = make(BATCH, norm="rms", bias=True)
    upstream = torch.rand(2, *BATCH.leading) if reduction == "none" else None
    options = {"upstream": upstream, "reduction": reduction}
    mask = torch.rand(BATCH.leading) < 0.5
    expected, expected_grads = ours(problem, mask=mask, **options)
    with torch.inference_mode():
        mask = mask.clone()
        problem.teacher_hidden = [h.clone() for h in problem.teacher_hidden]
        problem.teacher_head = problem.teacher_head.map(torch.clone)
    assert problem.teacher_head.weight.is_inference()
    loss, grads = ours(problem, mask=mask, **options)
    assert torch.equal(loss, expected)
    assert all(torch.equal(g, expected_grads[name]) for name, g in grads.items())


def strided(x):
    """Return the same values in a layout without a unit stride."""
    wide = torch.zeros(*x.shape[::-1], 2, dtype=x.dtype)
    view = wide[..., 0].permute(*range(x.dim() - 1, -1, -1))
    view.copy_(x.detach())
    assert x.dim() == 1 or not view.is_contiguous()
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_that_are_not_contiguous(backend, reduction):
    problem = make(BATCH, **FEATURES["everything"])
    options = {"mask": strided((torch.rand(BATCH.leading) < 0.5).float()), "reduction": reduction}
    if reduction == "none":
        options["upstream"] = torch.ones(()).expand(2, *BATCH.leading)
    check(problem.map(strided), truth=problem, backend=backend, **options)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
def test_leaves_that_are_views_and_shared(backend):
    base = torch.randn(6, 9, requires_grad=True)
    teacher = torch.randn(5, 9)
    head, other = torch.randn(2, 17, 9)
    pairs = ([base[:5], base[:5], base[1:]], [teacher] * 3, head, other)
    (grad,) = torch.autograd.grad(symmetric_lens_loss(*pairs, backend=backend), base)
    truth = symmetric_lens_loss(*pairs, backend="reference")
    assert_close(grad, torch.autograd.grad(truth, base)[0], 1e-5)


def test_float16_gradients_do_not_underflow_in_a_long_batch():
    """The division by 4000 tokens is applied after the GEMMs."""
    problem = make(Shape((4000,), 31, 8, 8, 1), std=2.0).to(torch.float16)
    _, expected = oracle(problem)
    _, grads = ours(problem)
    assert_close(grads["weight"], expected["weight"], 2e-3)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl", "forward_kl"])
def test_float16_gradients_do_not_underflow_near_convergence(backend, divergence):
    """Heads that differ by 0.3 % have logit gradients near 1e-7, of which float16 would keep only
    one digit."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).half().requires_grad_()
    head = (torch.randn(16384, 32) / 32**0.5).half().requires_grad_()
    teacher = (head.detach() * (1 + 0.003 * torch.randn(16384, 32))).half()
    call = {"divergence": divergence, "backend": backend}
    loss = symmetric_lens_loss(hidden, hidden.detach(), head, teacher, **call)
    grads = torch.autograd.grad(2.0**16 * loss, [hidden, head])
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    truth = dense.lens_loss(
        exact[:1], [exact[0].detach()], LensHead(exact[1]), LensHead(teacher), divergence=divergence
    )
    expected = torch.autograd.grad(2.0**16 * truth, exact)
    assert_close(grads[0].double(), expected[0], 1e-3)
    assert_close(grads[1].double(), expected[1], 1e-3)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize(("divergence", "size"), [("reverse_kl", 100.0), ("jeffreys", 100.5)])
def test_float16_gradients_of_large_log_ratios_do_not_overflow(backend, divergence, size):
    """The student gives both entries the probability 1/2, and the teacher gives the second entry
    exp(-400)."""
    student = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    teacher, head = torch.tensor([[0.0, -400.0]]).half(), torch.eye(2).half()
    call = {"divergence": divergence, "backend": backend}
    symmetric_lens_loss(student, teacher, head, head, **call).backward()
    assert student.grad[0].tolist() == pytest.approx([-size, size], rel=1e-3)


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
def test_float16_gradients_of_pairs_with_small_weights(backend):
    problem = make(Shape((32,), 2000, 16, 16, 4), std=2.0).to(torch.float16)
    options = {"layer_weights": [1.0, 1e-2, 1e-3, 1e-4], "reduction": "sum"}
    _, expected = oracle(problem, **options)
    loss = loss_of(symmetric_lens_loss, problem, backend=backend, **options)
    # Hidden gradients are float16 too, so the loss is scaled up against their underflow.
    grads = problem.gradients(loss, grad_outputs=torch.tensor(2.0**10))
    for i in range(4):
        assert_close(grads[f"hidden{i}"].double() / 2**10, expected[f"hidden{i}"], 1e-3)
