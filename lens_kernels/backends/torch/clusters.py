"""The size of the cluster of GPU programs that holds a row of logits in registers, if one can."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch

from lens_kernels import compat
from lens_kernels.call import LossCall

# A GPU program has 8 warps. Each thread holds up to 5 groups of 8 logits of each model.  REGISTERS
# limits the registers of a thread, by the GPU's compute capability. With 128 registers on Hopper
# (9), two programs fit on a multiprocessor. On Blackwell (10), the limit would make threads spill
# registers.
WARPS, GROUP, BLOCKS = 8, 8, 5
LANES = 32 * WARPS
REGISTERS = {9: 128, 10: None}
# The largest number of programs in a cluster that Hopper and Blackwell GPUs support.
PROGRAMS = 16
MOST = PROGRAMS * BLOCKS * LANES * GROUP
# Older versions of Triton cannot compile reductions over a cluster, or fail if a row has several
# blocks.
TRITON = (3, 9)
# The minimum number of multiprocessors, which data-centre GPUs of the Hopper and Blackwell
# generations have. A smaller GPU may not have room for a cluster of 16 programs.
PROCESSORS = 100


class Cluster(NamedTuple):
    """The size of a cluster: its programs, and the number of blocks that each of its threads holds.

    ``registers`` limits the registers of a thread. None means no limit.
    """

    programs: int
    blocks: int
    registers: int | None = REGISTERS[9]

    def options(self, plain: bool) -> dict[str, Any]:
        """Return the options with which ``cluster_pass_kernel`` is launched.

        Registers are limited only if the call is ``plain``. Any other call would spill registers.
        """
        sizes = {"LANES": self.programs * LANES, "GROUP": GROUP, "BLOCKS": self.blocks}
        launch = {"num_warps": WARPS, "num_ctas": self.programs, "enable_fp_fusion": True}
        return sizes | launch | ({"maxnreg": self.registers} if plain else {})


def that_holds(vocab_size: int) -> Cluster | None:
    """Return the smallest cluster that can hold a row of logits, or None if no cluster can."""
    programs, block = 1, LANES * GROUP
    while programs * BLOCKS * block < vocab_size:
        programs *= 2
    if programs > PROGRAMS:
        return None
    return Cluster(programs, math.ceil(vocab_size / (programs * block)))


@compat.constant_in_graphs
def are_supported(device: torch.device) -> bool:
    """Return whether the installed Triton and this GPU can run ``cluster_pass_kernel``."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
        return False
    found = torch.cuda.get_device_properties(device)
    return found.major in REGISTERS and found.multi_processor_count >= PROCESSORS


def for_rows(device: torch.device, vocab_size: int) -> Cluster | None:
    """Return the smallest cluster that can hold a row on this device, or None if no cluster can."""
    cluster = that_holds(vocab_size) if are_supported(device) else None
    if cluster is None or device.type != "cuda":
        return cluster
    major, _ = torch.cuda.get_device_capability(device)
    return cluster._replace(registers=REGISTERS[major])


def for_call(call: LossCall) -> Cluster | None:
    """Return the smallest cluster that can hold a row of the call, or None if no cluster can.

    The result is None for a call with both a ``grad_threshold`` and a softcap. The kernel for both
    would need more registers than a thread has. It is None with a process group too, because the
    ranks combine results between the sweeps over a row.
    """
    if call.group or (call.grad_threshold is not None and has_cap(call)):
        return None
    return for_rows(call.row_weight.device, call.vocab_size)


def has_cap(call: LossCall) -> bool:
    """Return whether the head of the student or of a teacher has a softcap."""
    return any(head.softcap is not None for head in (call.student_head, *call.teacher_heads))
