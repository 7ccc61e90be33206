"""All contenders compute the same loss, and fake tensors predict the memory that they use."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks.support import memory, providers
from benchmarks.support.contenders import Contender, check, gather
from benchmarks.support.environment import CPU
from benchmarks.support.providers import CONTENDERS, SPEED_CONTENDERS, dense
from benchmarks.support.shapes import Job

# Liger is left out, because it takes many seconds to compile. The benchmarks check its loss before
# they measure.
KEYS = [key for key in CONTENDERS if key != "liger"]


@pytest.fixture
def contender(request):
    found = (CONTENDERS | SPEED_CONTENDERS)[request.param]
    if (reason := found.skip_reason(CPU)) is not None:
        pytest.skip(f"{found.label()}: {reason}")
    return found


@pytest.mark.parametrize("contender", [*KEYS, "dense_compiled", "published"], indirect=True)
def test_contender_computes_the_loss_and_gradients_of_the_oracle(contender, monkeypatch):
    # torch.compile's "eager" backend tests the contender's graph, without the cost of compiling it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    check(contender, CPU)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda inputs: dense(inputs.pairs(1)), "no gradient 1"),
        (lambda inputs: dense(inputs) * 1.001 - 1e-3 * dense(inputs).detach(), "gradient 0 is off"),
        (lambda inputs: dense(replace(inputs, mask=None)), r"loss [\d.]+, .* \(40% masked\)"),
    ],
)
def test_check_refuses_a_contender_that_computes_something_else(wrong, message):
    with pytest.raises(RuntimeError, match=message):
        check(Contender("wrong", "wrong", lambda: wrong), CPU)


@pytest.mark.parametrize(("by", "epsilon"), [(1e-8, 1e-8), (1e-8, 0.0), (3e-8, 1e-8)])
def test_check_allows_a_loss_lower_by_the_contenders_epsilon(by, epsilon):
    def lower(inputs):
        return dense(inputs) - by * inputs.student_head.shape[0]

    with pytest.raises(RuntimeError, match="loss") if by > epsilon else nullcontext():
        check(Contender("low", "low", lambda: lower, epsilon=epsilon), CPU)
    known = (SPEED_CONTENDERS | CONTENDERS).values()
    assert {c.key: c.epsilon for c in known if c.epsilon} == {"published": 1e-8}


def test_gather_lists_unusable_contenders_with_the_reason(capsys):
    def broken():
        raise OSError("libsomething.so is missing\nmore")

    everyone = [
        CONTENDERS["dense"],
        Contender("broken", "broken", broken, package="torch", release="0"),
        Contender("absent", "absent", lambda: dense, package="no-such", release="1.2"),
        Contender("gpu", "gpu", lambda: dense, gpu_only=True),
        Contender("wrong", "wrong", lambda: lambda inputs: dense(inputs) * 2),
    ]
    everyone = {contender.key: contender for contender in everyone}
    present, missing = gather(everyone, CPU, needed=["dense", "broken"])
    assert [*present] == ["dense"]
    assert missing.pop("wrong").startswith("RuntimeError: wrong gives a wrong result: loss")
    assert missing == {
        "broken": "cannot be loaded: OSError: libsomething.so is missing",
        "absent": "not installed; pip install no-such==1.2",
        "gpu": "needs a GPU",
    }
    assert "absent: not installed; pip install no-such==1.2" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="gives a wrong result"):
        gather(everyone, CPU, needed=["wrong"])


def test_mask_reduces_tokens_and_floor_by_its_share():
    job = Job(tokens=40, vocab=50, student_width=8, teacher_width=8, masked=0.25)
    inputs, unmasked = job.make(), replace(job, masked=0.0)
    # the masked positions are spread at random
    assert inputs.mask.sum() == 30 and 0 < inputs.mask[:10].sum() < 10
    assert torch.equal(inputs.counted(x := inputs.student_hidden[0]), x[inputs.mask])
    assert job.gemm_flops() == 0.75 * unmasked.gemm_flops()
    assert unmasked.make().mask is None
    assert torch.equal(unmasked.make().student_head, inputs.student_head)


def assert_fakes_are_right(contender, job, kept=True):
    fake, (real, _) = contender.fake_memory(job), contender.observe(job.make(), memory.measure)
    assert fake.peak == pytest.approx(real.peak, rel=0.01)
    assert not kept or fake.kept == pytest.approx(real.kept, rel=0.01)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("contender", KEYS, indirect=True)
def test_fake_tensors_predict_the_memory_of_a_real_run(contender, pairs):
    job = Job(tokens=128, vocab=6000, pairs=pairs, student_width=64, teacher_width=96)
    assert_fakes_are_right(contender, job)


def test_fake_tensors_predict_the_memory_of_the_compiled_pass(monkeypatch):
    """With fake tensors, a substitute for the compiled pass allocates the same memory."""
    monkeypatch.setattr(providers.pointwise_pass, "CPU_COMPILE_LOGITS", 0)
    job = Job(tokens=256, vocab=20000, student_width=16, teacher_width=24)
    assert_fakes_are_right(CONTENDERS["lens_kernels"], job, kept=False)
