"""Checks that a lens gives the model's own logits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from lens_kernels.hf.model.families import REGISTERED, class_name
from lens_kernels.hf.model.fitting import difference, norm_difference, probe
from lens_kernels.hf.model.parts import ModelLens
from lens_kernels.hf.model.tracing import Trace
from lens_kernels.lens import LensHead

# The largest product of the head in each run. Only large products reveal a soft cap, but a scale
# shows in all of them.
PROBES = (1.0, 60.0, 1000.0)


def check_lens(lens: ModelLens, run: Trace) -> None:
    """Check that the lens of the last block's output gives the model's logits in ``run``.

    There are three checks. The first check applies the whole lens to the model's own hidden states.
    The second check compares the norms on random rows, some so small that ``eps`` matters. The
    third check compares scale and soft cap on chosen products of the head, because the model's own
    logits may be too small for the soft cap to matter.

    The caller sets the model's mode, with ``state.measured``.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    head, norm = lens.head_in(run.model), lens.norm_in(run.model)
    _accept(run, "logits", difference(_read(lens, head, run), run.logits), run.exact)
    if norm is not None and head.norm is not None:
        error = norm_difference(norm, head.norm, head.weight.shape[1])
        _accept(run, "norm", error, exact=True)
    plain = replace(head, bias=None, scale=lens.scale)
    for products, logits in probe(run, lens.decoder, PROBES):
        error = difference(plain.logits(products, 1.0)[0], logits)
        _accept(run, "logits", error, logits.itemsize >= 4)


def _read(lens: ModelLens, head: LensHead, run: Trace) -> Tensor:
    call = run.last(lens.blocks_in(run.model)[-1])
    if call is None or call.returned is None:
        raise ValueError(
            f"the last block in {lens.blocks!r} of {class_name(run.model)} does not run, so its"
            " lens cannot be compared with the logits"
        )
    weight = head.weight
    x = call.returned.to(weight.device).float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    # The weight may be too large for a copy in float32.
    products = nn.functional.linear(x.to(weight.dtype), weight)
    return head.logits(products.float(), 1.0)[0]


def _accept(run: Trace, what: str, error: float, exact: bool) -> None:
    """Raise if an error, relative to the largest value, exceeds what rounding can explain."""
    if not error <= (1e-3 if exact else 5e-2):
        hint = (
            "The registered Family does not describe its norm or head: correct it and call"
            " register_family again"
            if run.model.config.model_type in REGISTERED
            else "Something acts between its last block and its logits that no lens has"
        )
        raise ValueError(
            f"the lens of {class_name(run.model)} does not reproduce the model's {what}: they"
            f" differ by {error:.1e} of the largest value. {hint}, or build a LensHead by hand"
        )
