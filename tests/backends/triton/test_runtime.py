"""The triton backend: its requirements, its errors, and the values that recompile its kernels."""

import importlib
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
from tests.support.problems import call_shape, loss_of, make, recorded

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))

# Statements that set torch's precision, and whether TF32 is then allowed. Each statement needs its
# own process, because torch cannot read the older switch after the newer switch was set.
TF32 = {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}
# Torch before 2.9 lacks the newer switch, ``fp32_precision``.
if not hasattr(torch.backends, "fp32_precision"):
    TF32 = {setting: allowed for setting, allowed in TF32.items() if "fp32" not in setting}
COMPILED = """
import importlib, json, os, pkgutil, sys, torch
from triton.runtime.jit import JITFunction
import lens_kernels.backends.triton.kernels as package
from lens_kernels import symmetric_lens_loss
from lens_kernels.backends.triton.kernels.operands import tf32_is_allowed

kernels, error, tf32 = {}, "", []
try:
    symmetric_lens_loss(*torch.ones(4, 3, 5), backend="triton")
except RuntimeError as caught:
    error = str(caught)
for module in pkgutil.iter_modules(package.__path__):
    module = importlib.import_module(f"{package.__name__}.{module.name}")
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            kernels[name] = {
                p.name: "constant" if p.is_constexpr else bool(p.do_not_specialize)
                for p in value.params
            }
for setting in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        exec(setting)
        os._exit(10 + tf32_is_allowed())
    tf32.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps([kernels, error, tf32]))
"""


@pytest.fixture(scope="module")
def compiled():
    """Return the output of the script COMPILED, which runs without Triton's interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILED]
    options = {"env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, input=json.dumps(list(TF32)), **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_error_on_a_cpu_names_the_interpreter_and_the_torch_backend(compiled):
    _, error, _ = compiled
    for part in ("'triton'", "cpu", "GPUs only", "TRITON_INTERPRET=1", "backend='torch'"):
        assert part in error


def test_tf32_is_torch_s_choice_by_either_switch(compiled):
    _, _, tf32 = compiled
    assert tf32 == [10 + allowed for allowed in TF32.values()]


# Kernel parameters that are compile-time constants: they select the formula and the block sizes.
CONSTANT = {"DIVERGENCE", "LAYER", "PRECISION", "BLOCK_N", "BLOCK_V", "BLOCK_K", "BLOCK_D"}
CONSTANT |= {"GROUP", "LANES", "BLOCKS"}
# Integer parameters that change between calls. Triton must not compile extra kernels if their value
# is 1 or a multiple of 16.
COUNTS = {"tokens", "vocab_size", "tiles_per_split", "group_blocks", "first_column"}
# Float parameters. Triton compiles no extra kernels for their values. An operand contains the
# floats slope and cap.
FLOATS = {"operand", "student", "beta", "one_minus_beta", "temperature", "eps", "offset"}


def test_new_numbers_do_not_recompile_the_kernels(compiled):
    kernels, _, _ = compiled
    sweeps = {"row_stats_kernel", "row_sums_kernel", "online_kl_kernel", "gradients_kernel"}
    sweeps.add("deviations_kernel")
    others = {"norm_kernel", "norm_backward_kernel", "row_pass_kernel", "cluster_pass_kernel"}
    others |= {"statistics_kernel", "sums_kernel", "gradient_kernel"}
    assert kernels.keys() == sweeps | others
    for kernel, parameters in kernels.items():
        constants = {name for name, kind in parameters.items() if kind == "constant"}
        assert constants <= CONSTANT, f"{kernel}: {constants - CONSTANT}"
        for name in parameters.keys() & COUNTS:
            assert parameters[name] is True, f"{kernel} is compiled for values of {name}"
    seen = {name for parameters in kernels.values() for name in parameters}
    assert COUNTS | FLOATS <= seen, "parameters were renamed: update COUNTS and FLOATS"


def test_the_numbers_of_a_call_reach_the_kernels_as_floats(monkeypatch):
    """For an integer, Triton would compile another kernel, and one more for the integer 1."""
    package = importlib.import_module("lens_kernels.backends.triton")
    head_of = package.evaluate.__globals__["_Head"]
    calls = recorded(monkeypatch, package, "evaluate")
    problem = make(ODD, norm="rms", offset=1, scale=2, softcap=3)
    loss_of(symmetric_lens_loss, problem, backend="triton", temperature=2)
    (((call,), _),) = calls
    head = call.student_head
    numbers = [call.temperature, call.beta, head.scale, head.softcap]
    numbers += [head.norm.eps, head.norm.offset]
    operand = head_of(head, call, call.temperatures[0]).operand(call.student_hidden[0], None, None)
    # The floats slope and cap come before the temperatures of rows, which are None here.
    numbers += operand.arguments()[-3:-1]
    assert all(type(x) is float for x in numbers), numbers


def test_auto_never_chooses_the_interpreter():
    """Interpreted kernels work on a CPU, but are 1000 times slower."""
    assert choose("triton", call_shape(CPU)).name == "triton"
    assert choose("auto", call_shape(CPU)).name == "torch"


@pytest.mark.parametrize(
    ("device", "fp64", "reason"),
    [
        (MPS, False, "'triton'.*mps.*NVIDIA and AMD.*backend='torch'"),
        (CPU, True, "float32.*float64.*backend='torch'"),
        (CUDA, True, "float32.*float64.*backend='torch'"),
    ],
    ids=["mps", "cpu", "cuda"],
)
def test_unsupported_tensors_are_refused_with_the_reason(device, fp64, reason):
    with pytest.raises(RuntimeError, match=reason):
        choose("triton", call_shape(device, fp64))
    assert choose("auto", call_shape(device, fp64)).name == "torch"


def test_a_missing_triton_is_reported_with_the_pip_command(monkeypatch):
    find = importlib.util.find_spec

    def without_triton(name, *args):
        return None if name == "triton" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_triton)
    for device in (CPU, CUDA):
        with pytest.raises(RuntimeError, match="pip install triton.*backend='torch'"):
            choose("triton", call_shape(device))
    with pytest.raises(RuntimeError, match="pip install triton"):
        loss_of(symmetric_lens_loss, make(ODD), backend="triton")
