"""Checks of compiled kernels against the float64 oracle, on any device.

``test_gpu.py`` runs the checks on a GPU at full size, and on the CPU at tiny sizes.
``test_functional.py`` runs some of them at the sizes of its other tests.
"""

from __future__ import annotations

import pytest
import torch

from lens_kernels import LensHead, symmetric_lens_loss
from tests.support import recompilation
from tests.support.compare import GRADIENT, LOSS, assert_close, assert_gradients, relative_error
from tests.support.grids import BATCH, FEATURES, Shape, several_chunks
from tests.support.objectives import some_labels
from tests.support.problems import (
    Problem,
    check_beside,
    make,
    nearly_converged,
    objective,
    oracle,
    plain_torch,
    related,
    solve,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
GIB = 1 << 30

# The numbers of tokens and vocabulary entries exceed every tile, and no block size divides them.
LARGE = Shape((3, 131), 1531, 197, 331, 1)
# Large hidden sizes, with which the kernels use their tiles for wide models.
WIDE = Shape((150,), 521, 2049, 2600, 1)


def on(problem: Problem, device: torch.device) -> Problem:
    """Return a copy of the problem on a device, with the tensors in its options."""
    there = problem.to(device)
    there.options = moved(problem.options, device)
    return there


def moved(options, device):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def solve_on(device, problem, backend, **options):
    """Solve the problem on a device, and return loss and gradients on the CPU."""
    options = moved({**options, "backend": backend}, device)
    loss, grads = solve(symmetric_lens_loss, on(problem, device), **options)
    for grad in grads.values():
        assert grad is not None and grad.device.type == device.type
    return loss.detach().cpu(), {name: grad.cpu() for name, grad in grads.items()}


def agree(first, second, loss_tolerance, tolerance):
    assert_close(first[0], second[0], loss_tolerance, "loss")
    for name, grad in second[1].items():
        assert_close(first[1][name], grad, tolerance, name)


# Checks that compare results with the oracle or between backends


def float32(device, backend, shape, feature, divergence, **options):
    problem = make(shape, std=2.0, **FEATURES[feature], divergence=divergence)
    expected, expected_grads = oracle(problem, **options)
    loss, grads = solve_on(device, problem, backend, **options)
    assert loss.dtype is torch.float32
    assert_close(loss, expected, LOSS, "loss")
    assert_gradients(grads, expected_grads, GRADIENT)


def half(device, backend, dtype, shape, feature, divergence, **options):
    """Compare a call in 16 bits with the oracle.

    Without a norm, the logits are exact. With a norm, the norm's result is rounded to 16 bits. Then
    the limits are relative to the error of plain torch, which also rounds the norm's result.
    """
    normed = "norm" in FEATURES[feature]
    problem = make(shape, std=2.0 if normed else 3.0, **FEATURES[feature], divergence=divergence)
    problem = problem.to(dtype)
    expected, expected_grads = oracle(problem, **options)
    loss, grads = solve_on(device, problem, backend, **options)
    assert loss.dtype is torch.float32 and all(g.dtype is dtype for g in grads.values())
    if not normed:
        assert_close(loss, expected, 1e-5, "loss")
        assert_gradients(grads, expected_grads, 1e-2)
        return
    ulp = torch.finfo(dtype).eps
    baseline = plain_torch(problem)
    # The slope of tvd jumps where p equals q, and rounding moves entries across this point. So only
    # the direction of its gradients is compared.
    if divergence == "tvd":
        for name, truth in expected_grads.items():
            cosine = torch.cosine_similarity(grads[name].double().flatten(), truth.flatten(), 0)
            assert cosine > 0.99, name
        grads = expected_grads = {}
    check_beside(
        baseline,
        (loss, grads),
        (expected, expected_grads),
        lambda error: error + ulp / 4,
        lambda error: error + max(1e-3, ulp),
    )


def parity(device, backend, dtype, shape, feature, divergence, **options):
    if dtype is torch.float32:
        float32(device, backend, shape, feature, divergence, **options)
    else:
        half(device, backend, dtype, shape, feature, divergence, **options)


def large(device, backend, dtype, shape, divergence, mask=False):
    """Compare a call with long sums with the oracle.

    The limit is at least twice the error of plain float32 torch. For tvd, gradients have the 16-bit
    limit even in float32, because the slope of tvd jumps where p equals q.
    """
    problem = make(shape, std=2.0, bias=True, divergence=divergence).to(dtype)
    options = {"mask": torch.rand(shape.leading) < 0.6} if mask else {}
    expected, expected_grads = oracle(problem, **options)
    loss, grads = solve_on(device, problem, backend, **options)
    exact = dtype is torch.float32 and divergence != "tvd"
    reference, reference_grads = (
        (expected, expected_grads) if mask else plain_torch(problem.to(torch.float32))
    )
    assert_close(loss, expected, max(1e-5, 2 * relative_error(reference, expected)), "loss")
    for name, truth in expected_grads.items():
        limit = max(GRADIENT * 10, 2 * relative_error(reference_grads[name], truth))
        assert_gradients({name: grads[name]}, {name: truth}, limit if exact else 2e-2)


def masked_rows_are_inert(device, backend, dtype, shape):
    clean = make(shape, norm="rms", bias=True).to(dtype)
    mask = torch.rand(shape.leading) < 0.6
    dirty = clean.spoil(~mask)
    loss, grads = solve_on(device, clean, backend, mask=mask)
    dirty_loss, dirty_grads = solve_on(device, dirty, backend, mask=mask)
    assert torch.equal(loss, dirty_loss) and bool(loss > 0)
    for name, grad in grads.items():
        assert torch.equal(grad, dirty_grads[name]), name
    assert not grads["hidden0"][~mask].any() and bool(grads["hidden0"][mask].any())


def whole_objective(device, backend, dtype, shape):
    """Compare the whole objective with the oracle, with labels at some positions only."""
    problem = make(shape, std=2.0, temperature=2.0, bias=True).to(dtype)
    labels = some_labels(shape)

    def solved(problem, backend):
        moved = labels.to(problem.student_head.weight.device)
        output = objective(problem, labels=moved, kd_ratio=0.5, backend=backend)
        grads = problem.gradients(output.loss)
        return output, {name: grad.cpu() for name, grad in grads.items()}

    expected, expected_grads = solved(problem.to(torch.float64), "reference")
    output, grads = solved(on(problem, device), backend)
    exact = dtype is torch.float32
    for name in ("loss", "ce", "kd", "lens", "per_layer"):
        actual, truth = getattr(output, name).cpu(), getattr(expected, name)
        assert_close(actual, truth, 2e-6 if exact else 2e-5, name)
    assert output.num_tokens.item() == (labels >= 0).sum()
    assert_gradients(grads, expected_grads, 2e-5 if exact else 1e-2)


def near_convergence(device, backend, divergence, tokens=64):
    problem = nearly_converged(divergence, tokens)
    expected, expected_grads = oracle(problem)
    if divergence == "jsd":
        assert 5e-8 < expected < 5e-7
    loss, grads = solve_on(device, problem, backend)
    assert_close(loss, expected, 1e-4, "loss")
    assert_gradients(grads, expected_grads, 1e-3)
    rows, _ = solve_on(device, problem, backend, reduction="none", upstream=torch.ones(1, tokens))
    assert bool((rows > 0).all()), "the divergence of different models must be positive"


def identical(device, backend, dtype, divergence, shape):
    problem = make(shape, std=5.0, **FEATURES["everything"], divergence=divergence).to(dtype)
    problem.imitate()
    loss, grads = solve_on(device, problem, backend, workspace_bytes=several_chunks(shape))
    assert loss.item() == 0.0
    for name, grad in grads.items():
        assert not grad.any(), name


def peaked(device, backend, divergence, std, shape):
    """Losses of peaked models are as accurate as float32 logits allow.

    Float32 rounds logits of 30 to 100 by 2e-6 to 4e-6, which is a relative error of every
    probability. The limit is the larger of two numbers: the rounding of a logit of two standard
    deviations, and twice the error of dense float32 torch. In 40 problems of each kind, the error
    was at most 3.9 for dense torch and 1.8 for the Triton kernels, in roundings of a logit of one
    standard deviation.
    """
    problem = related(shape, std, norm="rms", divergence=divergence)
    rounding = torch.finfo(torch.float32).eps * 2 * std
    check_beside(
        plain_torch(problem),
        solve_on(device, problem, backend),
        oracle(problem),
        lambda error: max(rounding, 2 * error),
        lambda error: max(1e-5, 2 * error),
    )


def agreement(device, dtype, divergence, shape):
    """Compare the backends with each other, at sizes that are too large for the oracle.

    16-bit problems have no norm, because backends may round the norm's result differently.
    """
    features = FEATURES["everything" if dtype is torch.float32 else "bias"]
    problem = make(shape, std=2.0, **features, divergence=divergence).to(dtype)
    results = [solve_on(device, problem, backend) for backend in BACKENDS]
    exact = dtype is torch.float32 and divergence != "tvd"
    agree(*results, 1e-5, 1e-4 if exact else 2e-2)


# Checks of determinism, large offsets and recompilation


def determinism(device, backend, dtype, divergence, shape, runs):
    problem = on(make(shape, std=2.0, **FEATURES["everything"], divergence=divergence), device)
    problem = problem.to(dtype)
    mask = (torch.rand(shape.leading) < 0.7).to(device)
    first = None
    for _ in range(runs):
        loss, grads = solve(symmetric_lens_loss, problem, backend=backend, mask=mask)
        again = {"loss": loss.detach(), **grads}
        first = first or again
        for name, x in again.items():
            assert torch.equal(x, first[name]), name


def captured(device, dtype):
    """A CUDA graph holds a call without a mask. A replay gives the results for new inputs."""
    problem = on(make(BATCH, std=2.0, **FEATURES["everything"]), device).to(dtype)

    def run():
        return solve(symmetric_lens_loss, problem, backend="torch")

    run()  # the first call compiles kernels, and a graph cannot hold that
    replay = run
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        replay = lambda: (graph.replay(), results)[1]  # noqa: E731
    with torch.no_grad():
        problem.student_hidden[0].mul_(1.5)
    expected, got = run(), replay()
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], grad) for name, grad in expected[1].items())


def need(device, size):
    """Skip the test if the GPU has less than ``size`` bytes of free memory."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free memory, has {free / GIB:.0f}")


def random_problem(device, tokens, vocab, widths, dtype, head_grad):
    """Create a random problem directly on the device, to save memory."""
    torch.manual_seed(0)

    def random(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale)

    heads = [LensHead(random(vocab, width, scale=2 / width**0.5)) for width in widths]
    heads[0].weight.requires_grad_(head_grad)
    hidden = [random(tokens, width) for width in widths]
    return Problem([hidden[0].requires_grad_()], [hidden[1]], *heads, {})


def same(problem, options, others):
    """Check that the triton backend agrees with torch, for each of two sets of options."""
    truth = solve(symmetric_lens_loss, problem, backend="torch")
    for each in (options, others):
        result = solve(symmetric_lens_loss, problem, backend="triton", **each)
        agree(result, truth, 1e-4, 2e-2)


def large_gradient(device, tokens, vocab, width, dtype):
    """Check a gradient of more than 2^31 logits, in one chunk and in many chunks."""
    everything = tokens * vocab * dtype.itemsize
    need(device, 2 * everything)
    problem = random_problem(device, tokens, vocab, (width, width), dtype, head_grad=True)
    whole = {"workspace_bytes": 2 * everything}
    same(problem, whole, {"workspace_bytes": everything // 16})


def large_head(device, tokens, vocab, width, other_width, dtype):
    """Check heads of more than 2^31 entries: the student's, then the teacher's."""
    need(device, 3 * vocab * width * dtype.itemsize)
    for widths in ((width, other_width), (other_width, width)):
        problem = random_problem(device, tokens, vocab, widths, dtype, head_grad=False)
        same(problem, {}, {"workspace_bytes": tokens * vocab})


def kernels():
    from lens_kernels.backends.triton.kernels import (
        gradients,
        norm,
        online_kl,
        row_stats,
        row_sums,
    )

    modules = gradients, norm, online_kl, row_stats, row_sums
    named = {name: x for module in modules for name, x in vars(module).items()}
    return [x for name, x in named.items() if name.endswith("_kernel")]


def compiled_again(device, calls):
    """Check that only the first call compiles kernels. Return the number of compiled kernels."""
    compiled = []
    for call in calls:
        recompilation.run(device, **call)
        caches = [cache[0] for k in kernels() for cache in getattr(k, "device_caches", {}).values()]
        compiled.append(sum(map(len, caches)))
    assert compiled == [compiled[0]] * len(calls)
    return compiled[0]
