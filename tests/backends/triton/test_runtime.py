"""When the triton backend runs and when it refuses, and what its kernels are compiled for.

The kernels are interpreted here. A fresh Python says what they are otherwise.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from lens_kernels import symmetric_lens_loss
from lens_kernels.dispatch import choose
from tests.support import ROOT
from tests.support.grids import ODD
from tests.support.problems import call_shape, loss_of, make

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def run_compiled(code, stdin=""):
    """Run a program in a fresh Python, whose kernels are not interpreted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)


def test_auto_never_means_the_interpreter():
    """It could serve tensors of a CPU here, a thousand times slower than torch."""
    assert choose("triton", call_shape(CPU)).name == "triton"
    assert choose("auto", call_shape(CPU)).name == "torch"


def test_on_a_cpu_it_names_the_interpreter_and_the_torch_backend():
    result = run_compiled(
        "import torch\n"
        "from lens_kernels import symmetric_lens_loss\n"
        "x = torch.randn(3, 4)\n"
        "try: symmetric_lens_loss(x, x, torch.randn(7, 4), torch.randn(7, 4), backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert result.returncode == 0, result.stderr
    for part in ("'triton'", "cpu", "GPUs only", "TRITON_INTERPRET=1", "backend='torch'"):
        assert part in result.stdout


TF32 = """
import os, sys, torch
from lens_kernels.backends.triton.kernels.operands import tf32_is_allowed
for setting in sys.stdin.read().splitlines():
    if os.fork() == 0:
        exec(setting)
        print(tf32_is_allowed(), flush=True)
        os._exit(0)
    os.wait()
"""
SETTINGS = {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}


def test_tf32_is_torch_s_choice_by_either_switch():
    """Each in a process of its own: once the newer switch is set, the older one cannot be read.

    torch 2.9 brought the newer one.
    """
    newer = hasattr(torch.backends, "fp32_precision")
    known = {k: v for k, v in SETTINGS.items() if newer or "fp32_precision" not in k}
    result = run_compiled(TF32, "\n".join(known))
    assert result.stdout.split() == [str(allowed) for allowed in known.values()], result.stderr


def test_on_another_device_it_says_what_it_is_for():
    with pytest.raises(RuntimeError, match="'triton'.*mps.*NVIDIA and AMD.*backend='torch'"):
        choose("triton", call_shape(MPS))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_float64_is_refused_on_every_device(device):
    with pytest.raises(RuntimeError, match="float32.*float64.*backend='torch'"):
        choose("triton", call_shape(device, fp64=True))
    assert choose("auto", call_shape(device, fp64=True)).name == "torch"


def test_without_triton_it_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec

    def without_triton(name, *args):
        return None if name == "triton" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_triton)
    for device in (CPU, CUDA):
        with pytest.raises(RuntimeError, match="pip install triton.*backend='torch'"):
            choose("triton", call_shape(device))
    with pytest.raises(RuntimeError, match="pip install triton"):
        loss_of(symmetric_lens_loss, make(ODD), backend="triton")


INSPECT = """
import importlib, json, pkgutil
from triton.runtime.jit import JITFunction
import lens_kernels.backends.triton.kernels as package
kernels = {}
for module in pkgutil.iter_modules(package.__path__):
    module = importlib.import_module(f"{package.__name__}.{module.name}")
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            kernels[name] = {
                p.name: "constexpr" if p.is_constexpr else bool(p.do_not_specialize)
                for p in value.params
            }
print(json.dumps(kernels))
"""

# What a kernel may be compiled for: the choice of formulas, and the tile.
CONSTANT = {"DIVERGENCE", "LAYER", "PRECISION", "BLOCK_N", "BLOCK_V", "BLOCK_K", "BLOCK_D"}
# Numbers that differ from call to call. Triton must not specialise on 1 or multiples of 16.
COUNTS = {"tokens", "vocab_size", "tiles_per_split", "first_column"}
# Floats, on whose values Triton specialises only if they are constants. ``operand`` contains slope
# and cap.
NUMBERS = {
    "operand",
    "student",
    "teacher",
    "beta",
    "one_minus_beta",
    "temperature",
    "eps",
    "offset",
}


@pytest.fixture(scope="module")
def kernels():
    """Return the parameters of every kernel, and whether they are constants or not specialised."""
    result = run_compiled(INSPECT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nothing_is_compiled_anew_when_numbers_change(kernels):
    sweeps = {"row_stats_kernel", "row_sums_kernel", "online_kl_kernel", "gradients_kernel"}
    assert kernels.keys() == {*sweeps, "norm_kernel", "norm_backward_kernel"}
    seen = set()
    for kernel, parameters in kernels.items():
        constants = {name for name, kind in parameters.items() if kind == "constexpr"}
        assert constants <= CONSTANT, f"{kernel}: {constants - CONSTANT}"
        for name, kind in parameters.items():
            if name in COUNTS:
                assert kind is True, f"{kernel} is compiled for values of {name}"
            seen.add(name)
    assert COUNTS | NUMBERS <= seen, "renamed: this test no longer looks at all of them"


def test_the_numbers_of_a_call_reach_the_kernels_as_floats(monkeypatch):
    """Given as integers, they would be another signature, and 1 a constant of its own."""
    module = importlib.import_module("lens_kernels.backends.triton.evaluate")
    calls = []
    evaluate = module.evaluate
    package = importlib.import_module("lens_kernels.backends.triton")
    monkeypatch.setattr(package, "evaluate", lambda call: calls.append(call) or evaluate(call))
    problem = make(ODD, norm="rms", offset=1, scale=2, softcap=3)
    loss_of(symmetric_lens_loss, problem, backend="triton", temperature=2)
    (call,) = calls
    head = call.student_head
    numbers = [call.temperature, call.beta, head.scale, head.softcap]
    numbers += [head.norm.eps, head.norm.offset]
    side = module._Head(head, call).operand(call.student_hidden[0], None, head.norm)
    numbers += side.arguments()[-2:]  # slope and cap
    assert all(type(x) is float for x in numbers), numbers
