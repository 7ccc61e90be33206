"""The row kernels, which compute losses and gradients of whole rows of logits, match float64."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lens_kernels import LensHead, cost
from lens_kernels import divergence as table
from lens_kernels.backends.torch import layout
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass
from lens_kernels.backends.torch.sharded_row_kernel_pass import ShardedRowKernelPass
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels import row_pass
from lens_kernels.call import LossCall
from lens_kernels.cost import CallShape
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows
from tests.backends.triton.test_device_fns import run_table
from tests.support import row_kernel_backend
from tests.support.cluster_kernel_backend import small_clusters
from tests.support.compare import GRADIENT, LOSS, assert_close
from tests.support.grids import DIVERGENCES, FEATURES, Shape, several_chunks
from tests.support.problems import capture_call, make, oracle, ours

INFINITY = float("inf")
KINDS = [(name, 0.5) for name in DIVERGENCES] + [("jsd", 0.3)]
kinds = pytest.mark.parametrize(("divergence", "beta"), KINDS)


@contextmanager
def over_one_rank():
    """Run the kernels of a vocabulary that is spread over ranks, on a group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with mock.patch.dict(PASS, {"class": ShardedRowKernelPass, "group": dist.group.WORLD}):
        yield
    dist.destroy_process_group()


PASS = {"class": RowKernelPass, "group": None}
KERNELS = {"row": nullcontext, "cluster": lambda: small_clusters(2), "split": over_one_rank}


@pytest.fixture(
    autouse=True,
    params=["row", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cluster", "split"))],
)
def kernel(request, monkeypatch):
    """Make the kernel read 64 entries at a time, so that a row takes several steps.

    In a cluster, each program has 2 lanes. ``test_cluster_pass.py`` has faster tests of clusters,
    and ``test_split_row_pass.py`` of the kernels for several ranks.
    """
    interpreter.prepare()
    monkeypatch.setitem(row_pass.OPTIONS, "LANES", 8)
    with KERNELS[request.param]():
        yield request.param


def run(zs, zt, divergence, beta=0.5, labels=None, temperature=1.0, head=None, grad_stats=False):
    """Run the kernel on a tile, and return losses, gradient and column statistics.

    The padding of all tiles is NaN.
    """
    rows, vocab = zs.shape
    head = head or LensHead(torch.zeros(vocab, 1))
    divergence = None if divergence is None else Divergence(divergence)
    hidden = [torch.zeros(rows, 1)]
    call = LossCall(
        student_hidden=hidden, teacher_hidden=hidden, student_head=head, teacher_heads=(head,),
        mask=None, labels=labels, row_weight=torch.ones(1, rows),
        divergences=(divergence,), normed=(False,), needs_grad=[True, True], beta=beta,
        temperature=temperature, vocab_size=vocab, workspace_bytes=1 << 20,
        group=PASS["group"].group_name if PASS["group"] else "",
    )  # fmt: skip
    kernel = PASS["class"](call, torch.float32, rows)

    def padded(z):
        tile = torch.full((rows, layout.row_stride(vocab)), float("nan"))
        tile[:, :vocab] = z
        return tile[:, :vocab]

    weight = torch.linspace(0.5, 1.5, rows)
    terms = Terms(divergence, weight, labels, None if labels is None else weight.flip(0))
    grad = torch.full((rows, layout.grad_stride(vocab)), float("nan"))[:, :vocab]
    grad_stats = kernel.grad_stats() if grad_stats else None
    losses = kernel.run([padded(zs), padded(zt)], terms, grad, grad_stats)
    return losses, grad, grad_stats


def truth(zs, zt, divergence, beta=0.5, labels=None, temperature=1.0):
    """Return losses and gradient of a tile, computed by autograd in float64."""
    zs = zs.double().requires_grad_()
    lq, lp = (z.clamp(min=table.FLOOR).div(temperature).log_softmax(-1) for z in (zs, zt.double()))
    weight = torch.linspace(0.5, 1.5, zs.shape[0])
    formula = table.pointwise(Divergence(divergence), beta)
    losses = [formula(lp, lq, lp.exp(), lq.exp(), (beta, 1 - beta))[0].sum(-1)]
    total = (losses[0] * weight).sum()
    if labels is not None:
        losses.append(-zs.log_softmax(-1).gather(1, labels[:, None])[:, 0])
        total = total + (losses[1] * weight.flip(0)).sum()
    return losses, torch.autograd.grad(total, zs)[0]


@kinds
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (3, 64), (2, 65), (4, 211)])
def test_a_tile_of_any_size(divergence, beta, rows, vocab):
    zs, zt = 3 * torch.randn(rows, vocab), 3 * torch.randn(rows, vocab)
    (loss,), grad, _ = run(zs, zt, divergence, beta)
    (expected,), expected_grad = truth(zs, zt, divergence, beta)
    if vocab == 1:
        assert not loss.any() and not grad.any()
        return
    assert_close(loss, expected, LOSS)
    assert_close(grad, expected_grad, GRADIENT)


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_labels_have_no_temperature(divergence, temperature):
    zs, zt = 3 * torch.randn(3, 150), 3 * torch.randn(3, 150)
    options = {"labels": torch.tensor([0, 149, 70]), "temperature": temperature}
    losses, grad, _ = run(zs, zt, divergence, **options)
    expected, expected_grad = truth(zs, zt, divergence, **options)
    for got, wanted in zip(losses, expected, strict=True):
        assert_close(got, wanted, LOSS)
    assert_close(grad, expected_grad, GRADIENT)


@kinds
@pytest.mark.parametrize("scale", [1.0, 0.02, 300.0])
def test_rows_without_a_finite_logit_are_uniform(divergence, beta, scale):
    """A row whose logits are all -inf has a uniform distribution over the vocabulary, at any scale.

    The padding beyond the vocabulary gets no probability.
    """
    vocab = 100
    head = LensHead(torch.zeros(vocab, 1), scale=scale)
    nothing = torch.full((2, vocab), -INFINITY)
    (loss,), grad, _ = run(nothing, nothing, divergence, beta, head=head)
    assert not loss.any() and not grad.any()
    zt = torch.randn(2, vocab)
    (loss,), grad, _ = run(nothing, zt / scale, divergence, beta, head=head)
    (expected,), expected_grad = truth(torch.zeros(2, vocab), zt, divergence, beta)
    assert_close(loss, expected, LOSS)
    assert_close(grad, expected_grad * scale, GRADIENT)


@kinds
def test_groups_at_minus_infinity_in_both_models_are_ignored(divergence, beta):
    zs, zt = torch.randn(2, 100), torch.randn(2, 100)
    (expected,), expected_grad = truth(zs[:, 80:], zt[:, 80:], divergence, beta)
    zs[:, :80] = zt[:, :80] = -INFINITY
    (loss,), grad, _ = run(zs, zt, divergence, beta)
    assert_close(loss, expected, LOSS)
    assert_close(grad[:, 80:], expected_grad, GRADIENT)
    assert not grad[:, :80].any()


@pytest.mark.parametrize(
    ("divergence", "side"), [("forward_kl", 0), ("reverse_kl", 1), ("jeffreys", 0)]
)
def test_a_divergence_from_nothing_is_infinite(divergence, side):
    logits = torch.randn(2, 2, 100)
    logits[side, 0, 7] = -INFINITY
    (loss,), _, _ = run(*logits, divergence)
    assert loss[0] == INFINITY and loss[1].isfinite()


@kinds
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_row_that_is_not_a_number_stays_alone(divergence, beta, side, value):
    logits = torch.randn(2, 2, 100)
    clean = run(*logits, divergence, beta)
    logits[side, 0, 99] = value
    (loss,), grad, _ = run(*logits, divergence, beta)
    assert loss[0].isnan() and grad[0].isnan().any()
    assert torch.equal(loss[1], clean[0][0][1]) and torch.equal(grad[1], clean[1][1])


@kinds
def test_near_convergence(divergence, beta):
    """Losses near 1e-7 are accurate to 1e-4.

    The logits are multiples of a power of two, so that their differences are exact.
    """
    grid = 2.0**-12
    zt = (torch.randn(3, 500) / grid).round() * grid
    zs = zt + (torch.randn(3, 500) * 4).round() * grid
    (loss,), grad, _ = run(zs, zt, divergence, beta)
    (expected,), expected_grad = truth(zs, zt, divergence, beta)
    assert_close(loss, expected, 1e-4)
    assert_close(grad, expected_grad, 1e-3)
    assert bool((loss > 0).all())


def test_the_statistics_describe_the_written_gradient():
    zs, zt = 3 * torch.randn(4, 150), 3 * torch.randn(4, 150)
    _, grad, grad_stats = run(zs, zt, "jsd", grad_stats=True)
    assert torch.equal(grad_stats.peak, grad.abs().amax(0))
    assert_close(grad_stats.total(), grad.double().abs().sum(), 1e-6)
    assert_close(grad_stats.squares_of_all(), grad.double().square().sum(), 1e-6)
    active = grad_stats.active(1e-3, False)
    assert 0 < active.numel() < 150
    rest = grad.index_fill(1, active, 0.0)
    assert_close(grad_stats.left_out(grad, active), rest.abs().sum(), 1e-4)
    zs[2, 9] = float("nan")
    assert run(zs, zt, "jsd", grad_stats=True)[2].peak[9].isnan()


def test_half_and_the_general_formula_agree():
    """``jsd_half``, the kernel's formula for beta 1/2, matches the library's jsd to 4e-6."""
    lq = -12 * torch.rand(4000)
    lp = (lq + torch.randn(4000) * torch.logspace(-7, 1, 4000)).clamp(max=0)
    wide = lp.double(), lq.double()
    p, q = (x.exp() for x in wide)
    expected = table.pointwise(Divergence.JSD, 0.5)(*wide, p, q, (0.5, 0.5))
    for got, wanted in zip(run_table("jsd_half", lp, lq, 0.5), expected, strict=True):
        assert bool(((got - wanted).abs() <= 4e-6 * wanted.abs().clamp(min=1e-30)).all())


@pytest.mark.parametrize("rows", [7, 30])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_rows_of_all_pairs_share_tiles_and_products(monkeypatch, feature, rows):
    """If a tile holds rows of several pairs, results match the oracle and repeat bit for bit."""
    shape = Shape((11,), 97, 12, 8, 3)
    problem = make(shape, **FEATURES[feature])
    options = {"layer_weights": [0.2, 1.5, 0.7], "mask": torch.rand(11) < 0.8}
    expected, expected_grads = oracle(problem, **options)
    options |= {"backend": "row_kernel", "workspace_bytes": several_chunks(shape, rows)}
    options |= {"process_group": PASS["group"]}
    loss, grads = ours(problem, **options)
    assert_close(loss, expected, LOSS)
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, GRADIENT, name)
    again, again_grads = ours(problem, **options)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


def test_steps_are_whole_blocks_that_cover_every_row_once():
    made = layout.apart(5 * 1000, 5000, torch.bfloat16, 1 << 30)
    # The 5000 rows are processed in three steps of almost equal size.
    assert (made.tile_rows, made.grad_rows) == (512, 1792)
    seen = []
    for tiles in made.steps(5, 1000):
        assert sum(p.stop - p.start for tile in tiles for p in tile) <= made.grad_rows
        for tile in tiles:
            assert sum(p.stop - p.start for p in tile) <= made.tile_rows
            seen += [(p.pair, at) for p in tile for at in range(p.start, p.stop)]
    assert seen == [(pair, at) for pair in range(5) for at in range(1000)]
    steps, tiles = made.counts(5, 1000)
    assert steps == 3 == len([*made.steps(5, 1000)])
    assert tiles == sum(map(len, made.steps(5, 1000)))


@pytest.mark.parametrize("room", [1 << 12, 1 << 20, 1 << 24, 1 << 28, 1 << 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_fit_the_workspace(room, dtype):
    made = layout.apart(10**5, 50257, dtype, room)
    stride = made.grad_stride
    held = made.tile_rows * layout.row_stride(50257) * 8 + made.grad_rows * stride * dtype.itemsize
    assert stride % layout.GRAD_LINE == 0 and held <= max(room, 10**6)
    assert made.tile_rows <= made.grad_rows <= layout.GRAD_ROWS
    assert made.tile_rows % layout.BLOCK == 0 or held < 2**28


@contextmanager
def counted_bytes():
    """Count the bytes of the kernels' loads and stores in a list with one number."""
    counted = [0]
    builder = interpreter.compat.triton_interpreter().InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(mask, pointer):
        # The plan leaves out single values, such as the weight of a row.
        if mask.data.size > 1:
            bits = pointer.dtype.scalar.element_ty.primitive_bitwidth
            counted[0] += int(mask.data.sum()) * bits // 8

    def counting_load(self, ptrs, mask, *args):
        count(mask, ptrs)
        return load(self, ptrs, mask, *args)

    def counting_store(self, ptrs, value, mask, *args):
        count(mask, ptrs)
        return store(self, ptrs, value, mask, *args)

    with (
        mock.patch.object(builder, "create_masked_load", counting_load),
        mock.patch.object(builder, "create_masked_store", counting_store),
    ):
        yield counted


def planned_and_counted(call):
    """Return the bytes of the plan's pointwise pass, and those that the kernel moves."""
    with torch.no_grad(), counted_bytes() as counted:
        row_kernel_backend.evaluate(call)
    shape = replace(CallShape.of(call), device=torch.device("cuda"))
    (step,) = [s for s in cost.row_chunks(shape).steps if s.name == "pointwise pass"]
    return step.bytes_moved, counted[0]


@kinds
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("with_grad", [True, False])
def test_the_plan_counts_the_bytes_that_the_kernel_moves(
    monkeypatch, kernel, divergence, beta, with_grad, given
):
    """The plan's bytes match those that the kernel reads and writes.

    If the teacher's statistics are given, the first sweep does not read the teacher's logits. A
    cluster reads all logits once. The kernels for several ranks always take three sweeps.
    """
    problem = make(Shape((5,), 211, 8, 8, 2), divergence=divergence, beta=beta)
    options = {"teacher_statistics": torch.zeros(2, 5, 2)} if given else {}
    call = capture_call(monkeypatch, problem, process_group=PASS["group"], **options)
    if not with_grad:
        call.needs_grad[:] = [False] * len(call.needs_grad)
    planned, counted = planned_and_counted(call)
    assert counted == planned
    # The kernel reads 8 entries at a time, so a row of 211 entries counts as 216. A sweep reads 8
    # bytes for an entry of both models, and a gradient entry takes 4 bytes.
    online = kernel == "row" and divergence in ("jeffreys", "forward_kl", "reverse_kl")
    given = given and kernel != "split"
    each = 8 * (3 - online - (not with_grad)) + 4 * with_grad - 4 * (given and not online)
    if kernel == "cluster":
        each = 8 + 4 * with_grad
    assert counted == 2 * 5 * 216 * each


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "sparse"])
def test_the_plan_counts_the_bytes_of_standardised_logits_and_sparse_targets(
    monkeypatch, kernel, divergence, with_grad
):
    """Standardised logits take up to two more sweeps, and sparse targets a few more values.

    Only the first of two pairs is standardised. Given statistics of the teacher are then unused. A
    row has as many targets as the kernel reads at a time.
    """
    if kernel == "split":
        pytest.skip("not supported over several ranks")
    sparse = divergence == "sparse"
    problem = make(Shape((5,), 211, 8, 8, 2), divergence="jsd" if sparse else divergence)
    options = {} if sparse else {"teacher_statistics": torch.zeros(2, 5, 2)}
    call = capture_call(monkeypatch, problem, **options)
    call = replace(call, standardized=(True, False))
    if sparse:
        ids = torch.rand(5, 211).argsort(-1)[:, : row_kernel_backend.LANES]
        targets = TargetRows(ids, torch.full(ids.shape, 1 / 16), torch.zeros(5))
        kinds = (Divergence.FORWARD_KL,) * 2
        call = replace(
            call, teacher_hidden=[], teacher_heads=(), targets=targets, divergences=kinds
        )
    if not with_grad:
        call.needs_grad[:] = [False] * len(call.needs_grad)
    planned, counted = planned_and_counted(call)
    assert counted == planned
    plain = 2 - (divergence != "jsd") + with_grad
    own, row = plain + 1 + with_grad, 5 * 216 * 4
    gradients = 2 * row * with_grad
    if sparse:
        more = 2 * 5 * 16 * (16 + 20 * with_grad)
        assert counted == row * (own + plain) + gradients + more
        return
    reads = 2 if kernel == "cluster" else 2 * plain - (divergence == "jsd")
    assert counted == row * (2 * own + reads) + gradients
