"""The ``torch`` backend's compiled pointwise pass, and the op in torch.compile and autocast."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import LensHead, LensNorm, adaptive, operator, symmetric_lens_loss
from lens_kernels import divergence as table
from lens_kernels.backends import compiled as compiled_calls
from lens_kernels.backends import matmul
from lens_kernels.backends.head_products import ColumnStatistics
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.lens import LogitMap
from lens_kernels.options import Divergence
from tests.support.compare import assert_close, assert_gradients, relative_error
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, ODD, several_chunks
from tests.support.objectives import make_objective, solve_objective, some_labels
from tests.support.problems import (
    check,
    loss_of,
    make,
    objective,
    oracle,
    ours,
    recorded,
)


@pytest.fixture
def attempting(monkeypatch):
    """Make every pointwise pass try to compile, for calls of any size."""
    torch._dynamo.reset()
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    monkeypatch.setattr(compiled_calls, "_compiler_failed", False)
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiling(attempting):
    """Make every pointwise pass compile, and raise an error if one cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert not compiled_calls._compiler_failed


@pytest.fixture
def tracing(compiling, monkeypatch):
    """Trace every pointwise pass with dynamo, but run the traced code uncompiled, to save time."""

    def trace(function):
        return torch.compile(function, dynamic=True, backend="eager")

    monkeypatch.setattr(compiled_calls, "_compile", trace)


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Watching(TorchDispatchMode):
    """A mode like those of memory trackers. It changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_first_call_inside_a_dispatch_mode_leaves_later_calls_compiled(compiling):
    def function(x):
        return x + int(torch.compiler.is_compiling())

    with Watching():
        assert compiled_calls.call(True, function, torch.zeros(2)).sum() == 0
    assert compiled_calls.call(True, function, torch.zeros(2)).sum() == 2


@pytest.mark.parametrize("capped", [False, True])
def test_the_compiled_pass_matches_the_oracle(compiling, capped):
    """Beta 1/2 takes one compilation, and all other betas together take another.

    Another temperature, scale, softcap or chunk size takes no new compilation.
    """
    before = compiled_graphs()
    for temperature, beta, scale, softcap, rows in (
        (2.0, 0.5, 0.7, 9.0, 5),
        (0.9, 0.5, 0.8, 7.0, 40),
        (1.3, 0.9, 1.4, 4.0, 9),
        (0.7, 0.2, 0.4, 2.0, 40),
    ):
        features = {"temperature": temperature, "beta": beta, "scale": scale}
        features |= {"softcap": softcap} if capped else {}
        problem = make(BATCH, std=2.0, norm="layer", bias=True, **features)
        check(problem, workspace_bytes=several_chunks(BATCH, rows))
    assert compiled_graphs() == before + 2


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_compiled(compiling, divergence, feature):
    problem = make(BATCH, std=2.0, **FEATURES[feature], divergence=divergence)
    check(problem, workspace_bytes=several_chunks(BATCH))


def test_each_divergence_has_its_own_compiled_code(tracing):
    problem = make(BATCH, std=2.0)
    options = {"labels": torch.randint(BATCH.vocab, BATCH.leading), "kd_ratio": 0.5}
    for final in (*DIVERGENCES, *DIVERGENCES[:2]):
        options["divergence"] = DIVERGENCES[-1 - DIVERGENCES.index(final)]
        options["final_divergence"] = final
        got, grads = solve_objective(problem, **options)
        truth, truth_grads = solve_objective(problem, backend="reference", **options)
        assert_close(got.kd, truth.kd, 1e-6, final)
        assert_close(got.lens, truth.lens, 1e-6, final)
        assert_gradients(grads, truth_grads, 1e-5)


def test_every_variant_of_the_pass_is_compiled(tracing):
    """torch would compile at most 8 of the 12 variants by default."""
    before = compiled_graphs()
    for divergence in DIVERGENCES:
        problem = make(BATCH, divergence=divergence)
        ours(problem)
        with torch.no_grad():
            loss_of(symmetric_lens_loss, problem)
    assert compiled_graphs() == before + 2 * len(DIVERGENCES)


def test_the_compiled_pass_keeps_its_digits_near_convergence(compiling):
    """The jsd is near 1e-7. A formula with ``exp(x) - 1`` would give it an error of 10 %."""
    student = 3 * torch.randn(4, 5000)
    teacher = student + 1e-3 * torch.randn(4, 5000)
    formula = table.pointwise(Divergence.JSD, 0.5)
    results = []
    for dtype, compiled in ((torch.float32, True), (torch.float64, False)):
        half, one = torch.tensor([0.5, 1.0], dtype=dtype)
        logits = LogitMap(None, one)
        zs, zt, weight = student.to(dtype), teacher.to(dtype), torch.ones(4, dtype=dtype)
        zs = zs.clone()
        comparison = pointwise_pass.Comparison(zt, weight, logits, logits, formula, (half, half))
        arguments = (zs, comparison, [], True)
        (loss,), _ = compiled_calls.call(compiled, pointwise_pass.tile_pass, *arguments)
        results.append((loss.double(), zs.double()))
    (loss, grad), (truth, true_grad) = results
    assert relative_error(loss, truth) <= 1e-3
    assert relative_error(grad, true_grad) <= 1e-3


def test_the_compiled_search_finds_the_same_active_entries(compiling):
    """The search is compiled once for blocks of any size, with gaps between rows."""
    before = compiled_graphs()
    grad = torch.randn(40, 520)[:, :501] * torch.logspace(-3, 0, 501)
    truth, found = ColumnStatistics(), ColumnStatistics(True)
    truth.add(grad)
    for block in grad.split((17, 9, 14)):
        found.add(block)
    for name in ("peak", "mass", "squares"):
        assert_close(getattr(found, name), getattr(truth, name), 1e-6, name)
    for threshold, relative in ((0.1, False), (0.3, True)):
        columns = found.active(threshold, relative)
        assert 50 < len(columns) < 450
        assert columns.tolist() == truth.active(threshold, relative).tolist()
    assert compiled_graphs() == before + 1


@pytest.mark.slow
def test_identical_models_are_exactly_zero_compiled(compiling):
    loss, grads = ours(make(ODD, std=5.0).imitate())
    assert loss == 0 and not any(g.any() for g in grads.values())


def test_the_compiled_pass_with_labels_matches_the_oracle(compiling):
    """Another temperature or beta takes no new compilation."""
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    labels[0] = -100
    before = compiled_graphs()
    for temperature, beta in ((1.7, 0.4), (0.8, 0.3)):
        features = FEATURES["everything"] | {"temperature": temperature}
        problem = make(BATCH, std=2.0, **features, beta=beta)
        options = {"labels": labels, "kd_ratio": 0.5, "final_divergence": "jsd"}
        out, grads = solve_objective(problem, workspace_bytes=several_chunks(BATCH), **options)
        truth, truth_grads = solve_objective(problem, backend="reference", **options)
        for name in ("loss", "ce", "kd", "lens", "per_layer"):
            assert_close(getattr(out, name), getattr(truth, name), 1e-6, name)
        assert_gradients(grads, truth_grads, 1e-5)
    assert compiled_graphs() == before + 2


def failing(error):
    def function(*args):
        raise error

    return function


def unusable_compilers():
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    broken = RuntimeError("no such compiler")
    return {
        "no compiler": InvalidCxxCompiler(),
        "compiler error": CppCompileError(["g++"], "broken"),
        "dynamo": BackendCompilerFailed(failing(broken), broken, None),
    }


@pytest.mark.parametrize("case", unusable_compilers())
def test_an_unusable_compiler_warns_once_and_changes_no_result(attempting, monkeypatch, case):
    problem = make(BATCH, std=2.0, norm="rms")
    expected, expected_grads = oracle(problem)
    attempts = []

    def compiler(function):
        attempts.append(function)
        return failing(unusable_compilers()[case])

    monkeypatch.setattr(compiled_calls, "_compile", compiler)
    with pytest.warns(UserWarning, match="uncompiled, which is slower: ") as caught:
        loss, grads = ours(problem, workspace_bytes=several_chunks(BATCH))
        loss, grads = ours(problem, workspace_bytes=several_chunks(BATCH))
    assert len(attempts) == 1
    assert len([w for w in caught if "uncompiled" in str(w.message)]) == 1
    assert_close(loss, expected, 1e-6)
    assert_gradients(grads, expected_grads, 1e-5)


def test_a_machine_without_a_compiler(attempting):
    import torch._inductor.config

    problem = make(BATCH, norm="rms", divergence="hellinger")
    settings = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    with torch._inductor.config.patch(settings):
        with pytest.warns(UserWarning, match="uncompiled, which is slower: "):
            check(problem, 1e-6)


def test_an_error_inside_the_pass_is_not_reported_as_the_compiler_s(attempting, monkeypatch):
    monkeypatch.setattr(compiled_calls, "_compile", lambda function: failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        ours(make(ODD))


def outside_and_inside(function):
    """Return a function, and the same function in ``torch.compile``."""
    torch._dynamo.reset()
    return function, torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("heads", ["outside", "inside"])
def test_fullgraph(heads, reduction):
    problem = make(BATCH, std=2.0, norm="rms", bias=True)
    upstream = torch.rand(2, *BATCH.leading) if reduction == "none" else torch.tensor(1.5)
    options = {"mask": torch.rand(BATCH.leading) < 0.5, "reduction": reduction}
    wanted = [*problem.leaves().values()]
    if reduction != "none":
        options["layer_weights"] = torch.tensor([0.5, 2.0], requires_grad=True)
        wanted.append(options["layer_weights"])

    def function(hidden, weight, bias, norm_weight, temperature):
        head = problem.student_head
        if heads == "inside":
            head = LensHead(weight, bias, LensNorm("rms", norm_weight, eps=1e-3))
        args = [2 * h for h in hidden], problem.teacher_hidden, head, problem.teacher_head
        return symmetric_lens_loss(*args, temperature=temperature, **options) + 1

    eager, compiled = outside_and_inside(function)
    parameters = problem.student_head.tensors().values()
    for temperature in (1.0, 1.5, 2.0):
        args = (problem.student_hidden, *parameters, temperature)
        expected, loss = eager(*args), compiled(*args)
        assert loss.shape == expected.shape and loss.dtype is expected.dtype
        assert_close(loss, expected, 1e-7)
        truth = torch.autograd.grad(expected, wanted, upstream)
        for grad, true_grad in zip(torch.autograd.grad(loss, wanted, upstream), truth, strict=True):
            assert_close(grad, true_grad, 1e-6)


@pytest.mark.parametrize("final", ["reverse_kl", "akl", {"akl": 0.7, "forward_kl": 0.2}])
def test_fullgraph_of_the_whole_objective(final):
    problem = make_objective(norm="rms")
    options = {"labels": some_labels(), "kd_ratio": 0.5, "final_divergence": final}
    options["mask"] = torch.rand(BATCH.leading) < 0.5
    eager, compiled = outside_and_inside(lambda: objective(problem, **options))
    expected, out = eager(), compiled()
    for name in ("loss", "kd", "per_layer"):
        assert_close(getattr(out, name), getattr(expected, name), 1e-6, name)
    assert_gradients(problem.gradients(2 * out.loss), problem.gradients(2 * expected.loss), 1e-5)


def test_compiled_by_inductor_and_without_gradients():
    problem = make(BATCH, std=2.0, norm="rms")
    torch._dynamo.reset()
    compiled = torch.compile(lambda: loss_of(symmetric_lens_loss, problem), fullgraph=True)
    expected, expected_grads = oracle(problem)
    loss = compiled()
    assert_close(loss, expected, 1e-6)
    assert_gradients(problem.gradients(loss), expected_grads, 1e-5)
    with torch.no_grad():
        loss = compiled()
    assert not loss.requires_grad
    assert_close(loss, expected, 1e-6)


def opcheck(monkeypatch, owner, name, function, *args, **options):
    """Run ``torch.library.opcheck`` on an operator, with the arguments that a call passes to it."""
    registered = getattr(owner, name)
    calls = recorded(monkeypatch, owner, name)
    function(*args, **options)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registered, calls[0][0], test_utils=checks)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_opcheck(monkeypatch, feature, dtype, reduction):
    problem = make(BATCH, **FEATURES[feature]).to(dtype)
    options = {"mask": torch.rand(BATCH.leading) < 0.5, "reduction": reduction}
    if reduction == "sum":
        options["layer_weights"] = torch.tensor([0.5, 2.0], dtype=torch.float64).requires_grad_()
    args = symmetric_lens_loss, problem
    opcheck(monkeypatch, operator, "lens_loss", loss_of, *args, **options)


@pytest.mark.parametrize("case", ["frozen head and labels", "no tokens"])
def test_opcheck_with_absent_inputs(monkeypatch, case):
    problem = make_objective().freeze("hidden0", "hidden1")
    options = {"labels": some_labels(), "kd_ratio": 0.5}
    if case == "no tokens":
        options["mask"] = torch.zeros(BATCH.leading)
    opcheck(monkeypatch, operator, "lens_loss", objective, problem, **options)


def test_opcheck_of_the_share_of_the_adaptive_kl(monkeypatch):
    problem, labels = make_objective(**FEATURES["everything"]), some_labels()
    options = {"labels": labels, "final_divergence": "akl"}
    with torch.no_grad():
        opcheck(monkeypatch, adaptive, "_head_share", objective, problem, **options)


def test_opcheck_of_scale_gradients():
    grads, upstream = [torch.randn(3, 4), torch.randn(5)], torch.tensor(2.0)
    like = [torch.randn(3, 4).bfloat16(), torch.randn(5).double()]
    torch.library.opcheck(operator.scale_gradients, (grads, upstream, like))
    for got, grad, x in zip(
        operator.scale_gradients(grads, upstream, like), grads, like, strict=True
    ):
        assert got.dtype is x.dtype
        torch.testing.assert_close(got, (2 * grad).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_operands_and_nothing_else(monkeypatch, dtype, reduction):
    """Autocast rounds the operands as in a linear layer. The logits stay in float32."""
    # with AMX, gradients would be rounded too
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)
    problem = make(BATCH, std=3.0)
    rounded = problem.to(dtype)
    expected, expected_grads = oracle(rounded, reduction=reduction)
    _, plain_grads = ours(problem, upstream=torch.ones(expected.shape), reduction=reduction)
    with torch.autocast("cpu", dtype):
        loss = loss_of(symmetric_lens_loss, problem, reduction=reduction)
    grads = problem.gradients(loss, grad_outputs=torch.ones(loss.shape))
    assert loss.dtype is torch.float32
    assert_close(loss, expected, 1e-5)
    for name, grad in grads.items():
        assert grad.dtype is torch.float32
        changed = relative_error(plain_grads[name], expected_grads[name])
        assert changed > 1e-4, "autocast changes nothing"
        assert_close(grad, expected_grads[name], 1e-5)


def test_autocast_accepts_mixed_dtypes():
    problem = make(ODD, std=2.0, norm="rms")
    mixed = problem.to(torch.bfloat16, "student_hidden", "teacher_head")
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = ours(mixed)
    assert_close(loss, oracle(problem.to(torch.bfloat16))[0], 2e-2)
    for name, x in mixed.leaves().items():
        assert grads[name].dtype is x.dtype


def test_autocast_inside_a_custom_operator_is_switched_off(always_active, monkeypatch):
    """Autocast inside the op would round the results of some GEMMs."""
    # with AMX, gradients would be rounded too
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)
    problem = make(ODD, std=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        check(problem, 1e-5, truth=problem.to(torch.bfloat16), grad_threshold=0.0)


def test_autocast_leaves_float64_alone():
    problem = make(ODD, std=2.0).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        check(problem, 1e-12, 1e-12)
