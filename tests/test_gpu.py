"""What only a GPU can show: compiled kernels and its own matrix products against the fp64 oracle.

Every check is a function of a device. Tests marked ``gpu`` call it on a GPU, at full size;
the tests at the end call the same functions on the CPU, at tiny sizes, for a GPU to find no typo.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import providers, speed_gpu
from lens_kernels import LensHead, distillation_loss, symmetric_lens_loss
from tests import gpu_report, recompilation
from tests.compare import assert_close, assert_gradients, relative_error
from tests.grids import BATCH, DIVERGENCES, FEATURES, ODD, Shape, several_chunks
from tests.problems import Problem, make, map_head, oracle, plain_torch, related, solve
from tests.test_functional import GRADIENT, LOSS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
GIB = 1 << 30
ROOT = Path(__file__).parents[1]

# More than a tile of every heuristic, both ways, and sizes that no block divides.
LARGE = Shape((3, 131), 1531, 197, 331, 1)
# Wide enough for the tiles of wide models.
WIDE = Shape((150,), 521, 2049, 2600, 1)


def gpu(test):
    """Mark a test that needs a GPU."""
    absent = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="no GPU")(test))


def on(problem: Problem, device: torch.device) -> Problem:
    """Return the same numbers on a device, on fresh leaves."""

    def leaf(x):
        return x.detach().to(device, copy=True).requires_grad_(x.requires_grad)

    heads = (map_head(head, leaf) for head in (problem.student_head, problem.teacher_head))
    hidden = ([leaf(h) for h in side] for side in problem.args()[:2])
    return Problem(*hidden, *heads, moved(problem.options, device))


def moved(options, device):
    """Return options with their tensors on a device."""
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def solve_on(device, problem, backend, **options):
    """Solve on a device; return loss and gradients on the CPU."""
    options = moved({**options, "backend": backend}, device)
    loss, grads = solve(symmetric_lens_loss, on(problem, device), **options)
    for grad in grads.values():
        assert grad is not None and grad.device.type == device.type
    return loss.detach().cpu(), {name: grad.cpu() for name, grad in grads.items()}


def agree(first, second, loss_tolerance, tolerance):
    """Compare two results of ``solve_on``."""
    assert_close(first[0], second[0], loss_tolerance, "loss")
    for name, grad in second[1].items():
        assert_close(first[1][name], grad, tolerance, name)


# Parity


def check_float32(device, backend, shape, feature, divergence, **options):
    problem = make(shape, std=2.0, **FEATURES[feature], divergence=divergence)
    expected, expected_grads = oracle(problem, **options)
    loss, grads = solve_on(device, problem, backend, **options)
    assert loss.dtype is torch.float32
    assert_close(loss, expected, LOSS, "loss")
    assert_gradients(grads, expected_grads, GRADIENT)


def check_16_bit(device, backend, dtype, shape, feature, divergence, **options):
    """Without a norm logits are exact; with one, its result is rounded as models round it."""
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
    rounded, rounded_grads = plain_torch(problem)
    ulp = torch.finfo(dtype).eps
    assert relative_error(loss, expected) <= relative_error(rounded, expected) + ulp / 4
    for name, truth in expected_grads.items():
        if divergence == "tvd":  # rounding decides at which entries its slope jumps
            cosine = torch.cosine_similarity(grads[name].double().flatten(), truth.flatten(), 0)
            assert cosine > 0.99, name
            continue
        baseline = relative_error(rounded_grads[name], truth)
        assert relative_error(grads[name], truth) <= baseline + max(1e-3, ulp), name


def check_parity(device, backend, dtype, shape, feature, divergence, **options):
    if dtype is torch.float32:
        check_float32(device, backend, shape, feature, divergence, **options)
    else:
        check_16_bit(device, backend, dtype, shape, feature, divergence, **options)


def check_large(device, backend, dtype, shape, divergence, mask=False):
    """The longer the sums, the more rounding: float32 torch is the measure where it errs more.

    tvd has a slope that jumps at ties, of which so many entries have some: its gradient is only
    compared as 16-bit ones are.
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


def check_masked_rows_are_inert(device, backend, dtype, shape):
    clean = make(shape, norm="rms", bias=True).to(dtype)
    mask = torch.rand(shape.leading) < 0.6
    dirty = clean.to(dtype)
    with torch.no_grad():
        for h in (*dirty.student_hidden, *dirty.teacher_hidden):
            h[~mask] = float("nan")
    loss, grads = solve_on(device, clean, backend, mask=mask)
    dirty_loss, dirty_grads = solve_on(device, dirty, backend, mask=mask)
    assert torch.equal(loss, dirty_loss) and bool(loss > 0)
    for name, grad in grads.items():
        assert torch.equal(grad, dirty_grads[name]), name
    assert not grads["hidden0"][~mask].any() and bool(grads["hidden0"][mask].any())


def check_objective(device, backend, dtype, shape):
    """The whole objective with labels, some of them missing."""
    problem = make(shape, std=2.0, temperature=2.0, bias=True).to(dtype)
    labels = torch.randint(shape.vocab, shape.leading)
    labels[torch.rand(shape.leading) < 0.3] = -100

    def solved(problem, backend):
        final = {
            "student_final": problem.student_hidden.pop(),
            "teacher_final": problem.teacher_hidden.pop(),
        }
        device = problem.student_head.weight.device
        output = distillation_loss(
            *problem.args(), **final, labels=labels.to(device), kd_ratio=0.5, backend=backend,
            **problem.options,
        )  # fmt: skip
        problem.student_hidden.append(final["student_final"])
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


def check_near_convergence(device, backend, divergence, tokens=64, vocab=1024):
    """A jsd near 1e-7. Rounding of the logits themselves is kept out by an exact head."""
    grid = 2.0**-12
    z_t = (torch.randn(tokens, vocab) / grid).round() * grid
    z_s = z_t + (torch.randn(tokens, vocab) * 4).round() * grid
    head = LensHead(torch.eye(vocab))
    problem = Problem([z_s.requires_grad_()], [z_t], head, head, {"divergence": divergence})
    expected, expected_grads = oracle(problem)
    if divergence == "jsd":
        assert 5e-8 < expected < 5e-7
    loss, grads = solve_on(device, problem, backend)
    assert_close(loss, expected, 1e-4, "loss")
    assert_gradients(grads, expected_grads, 1e-3)
    rows, _ = solve_on(device, problem, backend, reduction="none", upstream=torch.ones(1, tokens))
    assert bool((rows > 0).all()), "a divergence of different models is positive"


def check_identical(device, backend, dtype, divergence, shape):
    problem = make(shape, std=5.0, **FEATURES["everything"], divergence=divergence).to(dtype)
    problem.teacher_hidden = [h.detach().clone() for h in problem.student_hidden]
    problem.teacher_head = problem.student_head
    loss, grads = solve_on(device, problem, backend, workspace_bytes=several_chunks(shape))
    assert loss.item() == 0.0
    for name, grad in grads.items():
        assert not grad.any(), name


def check_peaked(device, backend, divergence, std, shape):
    problem = related(shape, std, norm="rms", divergence=divergence)
    expected, expected_grads = oracle(problem)
    loss, grads = solve_on(device, problem, backend)
    plain, plain_grads = plain_torch(problem)
    ulp = torch.finfo(torch.float32).eps * std  # of such a logit
    assert_close(loss, expected, max(ulp, 2 * relative_error(plain, expected)), "loss")
    for name, truth in expected_grads.items():
        limit = max(1e-5, 2 * relative_error(plain_grads[name], truth))
        assert_gradients({name: grads[name]}, {name: truth}, limit)


def check_agreement(device, dtype, divergence, shape):
    """Both backends on the device, beyond what the oracle could be asked for.

    16-bit rows are not normed: the two round the result of the norm apart, where float32 ends.
    """
    features = FEATURES["everything" if dtype is torch.float32 else "bias"]
    problem = make(shape, std=2.0, **features, divergence=divergence).to(dtype)
    results = [solve_on(device, problem, backend) for backend in BACKENDS]
    exact = dtype is torch.float32 and divergence != "tvd"
    agree(*results, 1e-5, 1e-4 if exact else 2e-2)


# What a device's arithmetic, addresses and caches could break


def check_determinism(device, backend, dtype, divergence, shape, runs):
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


def need(device, size):
    """Skip if the device has less free memory."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free memory, {free / GIB:.0f} there are")


def random_problem(device, tokens, vocab, widths, dtype, head_grad):
    """Return a problem made on the device; copies of its heads would not fit everywhere."""
    torch.manual_seed(0)

    def random(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale)

    heads = [LensHead(random(vocab, width, scale=2 / width**0.5)) for width in widths]
    heads[0].weight.requires_grad_(head_grad)
    hidden = [random(tokens, width) for width in widths]
    return Problem([hidden[0].requires_grad_()], [hidden[1]], *heads, {})


def check_same(problem, options, others):
    """The triton backend gives the same under two sets of options, and the torch backend too."""
    truth = solve(symmetric_lens_loss, problem, backend="torch")
    for each in (options, others):
        result = solve(symmetric_lens_loss, problem, backend="triton", **each)
        agree(result, truth, 1e-4, 2e-2)


def check_large_gradient(device, tokens, vocab, width, dtype):
    """More than 2^31 entries of the logits' gradient at once, against a workspace for few."""
    everything = tokens * vocab * dtype.itemsize
    need(device, 2 * everything)
    problem = random_problem(device, tokens, vocab, (width, width), dtype, head_grad=True)
    whole = {"workspace_bytes": 2 * everything}
    check_same(problem, whole, {"workspace_bytes": everything // 16})


def check_large_head(device, tokens, vocab, width, other_width, dtype):
    """More than 2^31 entries of a head: the student's, then the teacher's."""
    need(device, 3 * vocab * width * dtype.itemsize)
    for widths in ((width, other_width), (other_width, width)):
        problem = random_problem(device, tokens, vocab, widths, dtype, head_grad=False)
        check_same(problem, {}, {"workspace_bytes": tokens * vocab})


def kernels():
    """Return every kernel of the triton backend."""
    from lens_kernels.backends.triton import gradients, norm, online_kl, row_stats, row_sums

    modules = gradients, norm, online_kl, row_stats, row_sums
    named = {name: x for module in modules for name, x in vars(module).items()}
    return [x for name, x in named.items() if name.endswith("_kernel")]


def check_recompilation(device, calls):
    """Only the first call compiles, whatever sizes and numbers the next have."""
    compiled = []
    for call in calls:
        recompilation.run(device, **call)
        caches = [cache[0] for k in kernels() for cache in getattr(k, "device_caches", {}).values()]
        compiled.append(sum(map(len, caches)))
    assert compiled == [compiled[0]] * len(calls)
    return compiled[0]


@gpu
def test_kernels_are_compiled():
    pytest.importorskip("triton")
    from lens_kernels.backends.triton.interpreter import INTERPRETING

    assert not INTERPRETING, "TRITON_INTERPRET is set: nothing here would say anything of the GPU"


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend, feature, divergence, dtype):
    chunks = {"workspace_bytes": several_chunks(BATCH, 12)}
    check_parity(GPU, backend, dtype, BATCH, feature, divergence, **chunks)


@gpu
@pytest.mark.parametrize("shape", [LARGE, WIDE], ids=["large", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_beyond_a_tile(backend, divergence, dtype, shape):
    check_large(GPU, backend, dtype, shape, divergence)
    check_large(GPU, backend, dtype, shape, divergence, mask=True)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_labels(backend, dtype):
    check_masked_rows_are_inert(GPU, backend, dtype, BATCH)
    check_objective(GPU, backend, dtype, BATCH)


@gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_convergence(backend, divergence):
    check_near_convergence(GPU, backend, divergence)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_models(backend, divergence, dtype):
    check_identical(GPU, backend, dtype, divergence, ODD)
    check_identical(GPU, backend, dtype, divergence, LARGE)


@gpu
@pytest.mark.parametrize("std", [10.0, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_distributions(backend, divergence, std):
    check_peaked(GPU, backend, divergence, std, ODD)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_backends_agree_at_the_size_of_a_model(divergence, dtype):
    check_agreement(GPU, dtype, divergence, Shape((512,), 50257, 768, 1600, 2))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_runs_are_the_same_bit_for_bit(backend, divergence, dtype):
    check_determinism(GPU, backend, dtype, divergence, replace(LARGE, pairs=2), runs=20)


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_offsets_beyond_32_bit_in_the_gradient(dtype):
    tokens, vocab = 20000, 131072
    assert tokens * vocab > 1.2 * 2**31
    check_large_gradient(GPU, tokens, vocab, 64, dtype)


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_offsets_beyond_32_bit_in_a_head(dtype):
    vocab, width = 262144, 10240
    assert vocab * width > 1.2 * 2**31
    check_large_head(GPU, 200, vocab, width, 64, dtype)


@gpu
def test_nothing_is_compiled_again_for_other_sizes_and_numbers():
    assert check_recompilation(GPU, recompilation.CALLS) > 0


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend):
    check_float32(torch.device("cuda", 1), backend, ODD, "everything", "jsd")


# Without a GPU


TINY = Shape((5,), 70, 24, 40, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoke(backend):
    """Each check runs, and passes, on the CPU."""
    if backend == "triton":
        interpreted()
    for dtype in DTYPES:
        for feature in ("plain", "everything"):
            check_parity(CPU, backend, dtype, TINY, feature, "jsd")
        check_objective(CPU, backend, dtype, TINY)
    check_large(CPU, backend, torch.float32, TINY, "jsd")
    check_large(CPU, backend, torch.bfloat16, TINY, "tvd", mask=True)
    check_masked_rows_are_inert(CPU, backend, torch.float16, TINY)
    check_near_convergence(CPU, backend, "jsd", tokens=3)
    check_identical(CPU, backend, torch.bfloat16, "tvd", TINY)
    check_peaked(CPU, backend, "reverse_kl", 10.0, TINY)
    check_determinism(CPU, backend, torch.bfloat16, "jsd", TINY, runs=2)


def test_smoke_of_what_compares_the_backends():
    interpreted()
    check_agreement(CPU, torch.float32, "jsd", TINY)
    check_agreement(CPU, torch.bfloat16, "tvd", TINY)
    check_large_gradient(CPU, 20, 130, 16, torch.bfloat16)
    check_large_head(CPU, 20, 130, 32, 16, torch.bfloat16)
    assert len(kernels()) == 6
    few = {**recompilation.FIRST, "tokens": 3, "vocab": 20}
    assert check_recompilation(CPU, [few, few]) == 0  # the interpreter compiles nothing


def interpreted():
    """Skip where kernels do not run on a CPU."""
    pytest.importorskip("triton")
    from lens_kernels.backends.triton.interpreter import INTERPRETING

    if not INTERPRETING:
        pytest.skip("kernels run on a CPU in the interpreter alone: TRITON_INTERPRET=1")


def test_no_call_but_the_first_has_a_new_key():
    """Triton's own keys of compiled kernels, found without a GPU: see recompilation.py."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.recompilation"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[: len(recompilation.CALLS)]
    numbers = {line.split()[0] for line in lines}
    assert len(numbers) == 1 and int(numbers.pop()) > 0, result.stdout


# What make test-gpu and make bench-gpu run


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


VERSIONS = ("device", "driver", "cuda", "hip", "torch", "triton", "python", "commit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_reports_say_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest, "main", None)
    monkeypatch.setattr(speed_gpu, "gather", None)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "this runs on a GPU, and torch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="this runs on a GPU, and torch"):
        speed_gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


PROBE = """
import pytest
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
def test_bad(): assert 1 == 2, "one"
@pytest.mark.gpu
def test_absent(): pytest.skip("needs 9 GiB")
@pytest.fixture
def broken(): raise OSError("two")
@pytest.mark.gpu
def test_broken(broken): pass
@pytest.mark.gpu
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
def test_without_mark(): pass
"""


def test_the_report_has_a_line_for_every_test(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_probe.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    code = (
        "import sys, pathlib; from benchmarks import harness; from tests import gpu_report\n"
        "harness.no_gpu = lambda: None\n"
        "harness.device_name = lambda device: 'Some GPU (80 GB)'\n"
        "harness.ROOT = pathlib.Path(sys.argv[1])\n"
        "sys.exit(gpu_report.main(['--out', sys.argv[1], '--', '-p', 'no:cacheprovider']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = read(tmp_path / "tests-some-gpu-80-gb.csv")
    found = {row["test"].split("::")[1]: (row["outcome"], row["note"]) for row in rows}
    assert found == {
        "test_good": ("passed", ""),
        "test_bad": ("failed", "AssertionError: one"),
        "test_absent": ("skipped", "needs 9 GiB"),
        "test_broken": ("failed", "OSError: two"),
        "test_skipped": ("skipped", "no GPU"),
    }
    for row in rows:
        assert float(row["seconds"]) >= 0 and set(VERSIONS) <= row.keys()
        assert row["device"] == "Some GPU (80 GB)" and row["torch"] == torch.__version__


def test_the_benchmark_runs_from_end_to_end(tmp_path):
    interpreted()
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--dtypes", "bfloat16"]
    speed_gpu.main([*options, "--contenders", "triton", "torch", "dense"])
    (path,) = tmp_path.iterdir()
    rows = read(path)
    assert [(row["dtype"], row["mode"], row["contender"]) for row in rows] == [
        ("bfloat16", mode, key)
        for mode in ("forward+backward", "forward")
        for key in ("floor", "triton", "torch", "dense")
    ]
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert (row["ratio_to_floor"] == "1.00") or row["contender"] != "floor"
        assert float(row["peak_with_gradients_mib"]) >= float(row["gradients_mib"])
        assert set(VERSIONS) <= row.keys()


@pytest.fixture
def fail(monkeypatch):
    """Let a contender of the benchmark fail."""

    def run(key, error):
        def loss(inputs):
            raise error

        failing = replace(speed_gpu.CONTENDERS[key], load=lambda: loss)
        monkeypatch.setitem(speed_gpu.CONTENDERS, key, failing)
        job = providers.Job(8, 60, 1, 16, 24)
        contenders = {k: speed_gpu.CONTENDERS[k] for k in ("torch", "trl")}
        return speed_gpu.job_rows("tiny", job, contenders, rounds=1)

    pytest.importorskip("trl")
    return run


@pytest.mark.parametrize(
    ("key", "error"),
    [("torch", torch.OutOfMemoryError("too much")), ("trl", ValueError("of its own\nmore"))],
)
def test_what_does_not_fit_and_peers_that_fail_stand_in_the_table(fail, capsys, key, error):
    rows = fail(key, error)
    assert len(rows) == 6
    failed = [row for row in rows if row["contender"] == key]
    note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert [row["note"] for row in failed] == [note] * 2
    assert all(not row["median_ms"] and not row["peak_with_gradients_mib"] for row in failed)
    assert all(row["median_ms"] for row in rows if row["contender"] != key)
    assert f"{key}: {note}" in capsys.readouterr().out


def test_a_backend_that_fails_ends_the_benchmark(fail):
    with pytest.raises(RuntimeError, match="backend 'torch'.*ValueError: a bug"):
        fail("torch", ValueError("a bug"))


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    wrong = replace(
        providers.CONTENDERS["trl"], package="torch", load=lambda: lambda i: providers.dense(i) * 2
    )
    monkeypatch.setitem(speed_gpu.CONTENDERS, "trl", wrong)
    present, missing = speed_gpu.gather(["dense", "trl"], CPU)
    assert [*present] == ["dense"] and "computes something else" in missing["trl"]
    monkeypatch.setitem(speed_gpu.CONTENDERS, "torch", replace(wrong, package=""))
    with pytest.raises(RuntimeError, match="computes something else"):
        speed_gpu.gather(["torch"], CPU)
