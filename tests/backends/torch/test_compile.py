"""The compiled pointwise pass, torch.compile around the op, its registration, and autocast."""

import warnings

import pytest
import torch

from lens_kernels import LensHead, LensNorm, distillation_loss, symmetric_lens_loss
from lens_kernels import divergence as table
from lens_kernels.backends import compiled as compiled_calls
from lens_kernels.backends import matmul
from lens_kernels.backends.head_products import ColumnStatistics
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.lens import LogitMap
from lens_kernels.operator import lens_loss, scale_gradients
from lens_kernels.options import Divergence
from tests.support.compare import assert_close, assert_gradients, relative_error
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, ODD, several_chunks
from tests.support.problems import Problem, capture_call, loss_of, make, objective, oracle, ours


@pytest.fixture
def compiling(monkeypatch):
    """Compile every pointwise pass, and fail where it silently runs uncompiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    monkeypatch.setattr(compiled_calls, "_compiler_failed", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert not compiled_calls._compiler_failed


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("capped", [False, True])
def test_the_compiled_pass_gives_the_oracle_s_numbers(compiling, capped):
    """It is compiled once for beta 1/2 and once for all other numbers of a call: 35 tokens in
    chunks of 5, of 9 with a last one of 8, and all at once; each float as compiled first, then
    others."""
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
        expected, expected_grads = oracle(problem)
        loss, grads = ours(problem, workspace_bytes=several_chunks(BATCH, rows))
        assert_close(loss, expected, 1e-6)
        assert_gradients(grads, expected_grads, 1e-5)
    assert compiled_graphs() == before + 2


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_compiled(compiling, divergence, feature):
    problem = make(BATCH, std=2.0, **FEATURES[feature], divergence=divergence)
    expected, expected_grads = oracle(problem)
    loss, grads = ours(problem, workspace_bytes=several_chunks(BATCH))
    assert_close(loss, expected, 1e-6)
    assert_gradients(grads, expected_grads, 1e-5)


def test_compiled_code_of_one_divergence_is_not_taken_for_another_s(compiling, monkeypatch):
    """Neither for the lenses nor for the final output, one call after the other in one process."""
    monkeypatch.setattr(
        compiled_calls,
        "_compile",
        lambda function: torch.compile(function, dynamic=True, backend="eager"),
    )
    problem = make(BATCH, std=2.0)
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    for final in (*DIVERGENCES, *DIVERGENCES[:2]):
        options = {"divergence": DIVERGENCES[-1 - DIVERGENCES.index(final)]}
        options["final_divergence"] = final
        got, grads = whole_objective(problem, labels, **options)
        truth, truth_grads = whole_objective(problem, labels, backend="reference", **options)
        assert_close(got.kd, truth.kd, 1e-6, final)
        assert_close(got.lens, truth.lens, 1e-6, final)
        assert_gradients(grads, truth_grads, 1e-5)


def test_every_variant_of_the_pass_is_compiled(compiling, monkeypatch):
    """More than the 8 at which torch gives up: each divergence, with gradients and without."""
    monkeypatch.setattr(
        compiled_calls,
        "_compile",
        lambda function: torch.compile(function, dynamic=True, backend="eager"),
    )
    before = compiled_graphs()
    for divergence in DIVERGENCES:
        problem = make(BATCH, divergence=divergence)
        ours(problem)
        with torch.no_grad():
            loss_of(symmetric_lens_loss, problem)
    assert compiled_graphs() == before + 2 * len(DIVERGENCES)


def test_the_compiled_pass_keeps_its_digits_near_convergence(compiling):
    """Logits 1e-3 apart have a jsd of 1e-7, which ``exp(x) - 1`` would give to 10 %."""
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
        arguments = (zs, comparison, None, True)
        (loss,) = compiled_calls.call(compiled, pointwise_pass.tile_pass, *arguments)
        results.append((loss.double(), zs.double()))
    (loss, grad), (truth, true_grad) = results
    assert relative_error(loss, truth) <= 1e-3
    assert relative_error(grad, true_grad) <= 1e-3


def test_the_compiled_search_for_active_entries_finds_what_the_other_does(compiling):
    """In blocks of several sizes, whose rows have gaps, compiled once."""
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
    problem = make(ODD, std=5.0)
    problem.teacher_hidden = [h.detach() for h in problem.student_hidden]
    problem.teacher_head = problem.student_head
    loss, grads = ours(problem)
    assert loss == 0 and not any(g.any() for g in grads.values())


def whole_objective(problem, labels, **options):
    out = objective(problem, labels=labels, kd_ratio=0.5, **options)
    return out, problem.gradients(out.loss)


def test_the_compiled_pass_with_labels_is_the_oracle_s(compiling):
    """For the numbers of a call that are compiled first, and for others."""
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    labels[0] = -100
    before = compiled_graphs()
    for temperature, beta in ((1.7, 0.4), (0.8, 0.3)):
        features = FEATURES["everything"] | {"temperature": temperature}
        problem = make(BATCH, std=2.0, **features, beta=beta)
        options = {**problem.options, "final_divergence": "jsd"}
        room = {"workspace_bytes": several_chunks(BATCH)}
        out, grads = whole_objective(problem, labels, **options, **room)
        truth, truth_grads = whole_objective(problem, labels, backend="reference", **options)
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
def test_an_unusable_compiler_is_warned_of_once_and_changes_nothing(monkeypatch, case):
    problem = make(BATCH, std=2.0, norm="rms")
    expected, expected_grads = ours(problem)
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    monkeypatch.setattr(compiled_calls, "_compiler_failed", False)
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
    assert_gradients(grads, expected_grads, 1e-6)


def test_a_machine_without_a_compiler(monkeypatch):
    """The real thing: Inductor looks for a program that does not exist."""
    import torch._inductor.config

    problem = make(BATCH, norm="rms", divergence="hellinger")
    expected, expected_grads = ours(problem)
    torch._dynamo.reset()
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    monkeypatch.setattr(compiled_calls, "_compiler_failed", False)
    settings = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    with torch._inductor.config.patch(settings):
        with pytest.warns(UserWarning, match="uncompiled, which is slower: "):
            loss, grads = ours(problem)
    torch._dynamo.reset()
    assert_close(loss, expected, 1e-6)
    assert_gradients(grads, expected_grads, 1e-6)


def test_an_error_of_ours_inside_the_pass_is_not_taken_for_the_compiler_s(monkeypatch):
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    monkeypatch.setattr(compiled_calls, "_compiler_failed", False)
    monkeypatch.setattr(compiled_calls, "_compile", lambda function: failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        ours(make(ODD))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("heads", ["outside", "inside"])
def test_fullgraph(heads, reduction):
    """The op is one node of the user's graph, whose gradients are those of the eager call."""
    problem = make(BATCH, std=2.0, norm="rms", bias=True)
    upstream = torch.rand(2, *BATCH.leading) if reduction == "none" else torch.tensor(1.5)
    mask = torch.rand(BATCH.leading) < 0.5
    layer_weights = None if reduction == "none" else torch.tensor([0.5, 2.0], requires_grad=True)

    def function(hidden, weight, bias, norm_weight, temperature):
        head = problem.student_head
        if heads == "inside":
            norm = LensNorm("rms", norm_weight, eps=1e-3)
            head = LensHead(weight, bias, norm)
        loss = symmetric_lens_loss(
            [2 * h for h in hidden],
            problem.teacher_hidden,
            head,
            problem.teacher_head,
            mask=mask,
            temperature=temperature,
            reduction=reduction,
            layer_weights=layer_weights,
        )
        return loss + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _, *parameters = problem.leaves().values()
    parameters = parameters[1:]
    wanted = [*problem.leaves().values()]
    wanted += [] if layer_weights is None else [layer_weights]
    for temperature in (1.0, 1.5, 2.0):
        args = (problem.student_hidden, *parameters, temperature)
        expected, loss = function(*args), compiled(*args)
        assert loss.shape == expected.shape and loss.dtype is expected.dtype
        assert_close(loss, expected, 1e-7)
        truth = torch.autograd.grad(expected, wanted, upstream)
        for grad, true_grad in zip(torch.autograd.grad(loss, wanted, upstream), truth, strict=True):
            assert_close(grad, true_grad, 1e-6)


def test_fullgraph_of_the_whole_objective_by_inductor():
    problem = make(BATCH, std=2.0, norm="rms")
    labels = torch.randint(BATCH.vocab, BATCH.leading)

    def function(first, final):
        out = distillation_loss(
            [first.tanh()],
            problem.teacher_hidden[:1],
            problem.student_head,
            problem.teacher_head,
            student_final=final,
            teacher_final=problem.teacher_hidden[1],
            labels=labels,
            kd_ratio=0.5,
        )
        return out.loss * 2, out.per_layer

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    expected, per_layer = function(*problem.student_hidden)
    loss, per_layer_compiled = compiled(*problem.student_hidden)
    assert_close(loss, expected, 1e-6)
    assert_close(per_layer_compiled, per_layer, 1e-6)
    assert_gradients(problem.gradients(loss), problem.gradients(expected), 1e-5)


def test_compiled_without_gradients():
    problem = make(BATCH)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: loss_of(symmetric_lens_loss, problem), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        loss = compiled()
    assert not loss.requires_grad
    assert_close(loss, loss_of(symmetric_lens_loss, problem), 1e-7)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_opcheck(monkeypatch, feature, dtype, deferred):
    problem = make(BATCH, **FEATURES[feature]).to(dtype)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(BATCH.leading) < 0.5
    call = capture_call(monkeypatch, problem, mask=mask, layer_weights=weights)
    torch.library.opcheck(lens_loss, ("torch", deferred, *call.pack()), test_utils=CHECKS)


def test_opcheck_of_frozen_sides_labels_and_no_tokens(monkeypatch):
    problem = make(BATCH)
    problem.student_head.weight.requires_grad_(False)
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    options = {"student_final": problem.student_hidden[0]}
    options |= {"teacher_final": problem.teacher_hidden[0], "labels": labels, "kd_ratio": 0.5}
    call = capture_call(monkeypatch, problem, distillation_loss, **options)
    torch.library.opcheck(lens_loss, ("torch", False, *call.pack()), test_utils=CHECKS)
    call = capture_call(monkeypatch, problem, mask=torch.zeros(BATCH.leading))
    torch.library.opcheck(lens_loss, ("torch", False, *call.pack()), test_utils=CHECKS)


def test_opcheck_of_scale_gradients():
    grads, upstream = [torch.randn(3, 4), torch.randn(5)], torch.tensor(2.0)
    like = [torch.randn(3, 4).bfloat16(), torch.randn(5).double()]
    torch.library.opcheck(scale_gradients, (grads, upstream, like))
    for got, grad, x in zip(scale_gradients(grads, upstream, like), grads, like, strict=True):
        assert got.dtype is x.dtype
        torch.testing.assert_close(got, (2 * grad).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_operands_and_nothing_else(monkeypatch, dtype, reduction):
    """As torch rounds the factors of a linear layer; the logits stay in float32."""
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)  # else the logits' gradient as well
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


def test_autocast_brings_mixed_dtypes_together():
    problem = make(ODD, std=2.0, norm="rms")
    rounded = problem.to(torch.bfloat16)
    mixed = Problem(
        rounded.student_hidden,
        problem.teacher_hidden,
        problem.student_head,
        rounded.teacher_head,
        {},
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = ours(mixed)
    expected, _ = oracle(rounded)
    assert_close(loss, expected, 2e-2)
    for name, x in mixed.leaves().items():
        assert grads[name].dtype is x.dtype


def test_autocast_inside_a_custom_operator_is_switched_off(always_active, monkeypatch):
    """Else the products of gathered entries would be rounded once more, in their results."""
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)  # else the logits' gradient is rounded
    problem = make(ODD, std=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = ours(problem, grad_threshold=0.0)
    expected, expected_grads = oracle(problem.to(torch.bfloat16))
    assert_close(loss, expected, 1e-5)
    assert_gradients(grads, expected_grads, 1e-5)


def test_autocast_leaves_float64_alone():
    problem = make(ODD, std=2.0).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = ours(problem)
    expected, expected_grads = oracle(problem)
    assert_close(loss, expected, 1e-12)
    assert_gradients(grads, expected_grads, 1e-12)
