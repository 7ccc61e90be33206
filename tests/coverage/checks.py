"""The checks of a model type: lens, objective, shallow copy, padding, gradient checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf import LensObjective, detect_lens, lens_head_from, shallow_copy
from lens_kernels.hf.model.capture import hidden_states
from reference.dense import divergence
from tests.coverage.tiny_models import LAYERS, model_of

LENSES = [1, LAYERS // 2]
CHECKS = ("lens", "step", "copy", "padding", "checkpointing")


def ids_of(model: Any) -> Tensor:
    """Return two rows of token ids, without the special tokens of the model's config."""
    named = {
        x
        for config in (model.config, model.config.get_text_config())
        for k, v in config.to_dict().items()
        if "token" in k
        for x in (v if isinstance(v, list) else [v])
    }
    usual = [i for i in range(model.get_output_embeddings().weight.shape[0]) if i not in named]
    return torch.tensor(
        [[usual[(5 * i + 11 * row + 2) % len(usual)] for i in range(10)] for row in range(2)]
    )


def close(found: Tensor, true: Tensor, tolerance: float) -> None:
    """Fail if the largest deviation exceeds ``tolerance`` times the largest true value."""
    error = (found.double() - true.double()).abs().max()
    largest = true.double().abs().max()
    if not error <= tolerance * largest:
        raise AssertionError(f"differs by {error / largest:.1e} of the largest value")


def batch_of(model: Any) -> dict[str, Tensor]:
    ids = ids_of(model)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def check_lens(model: Any) -> None:
    """Check the lens in three dtypes.

    In float32, its logits must also equal the model's on new tokens.
    """
    depths = len(detect_lens(model).indices)
    ids = ids_of(model)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        _, final = hidden_states(model, [], {"input_ids": ids})
    head = lens_head_from(model)
    close(head.logits(final @ head.weight.T, 1.0)[0], logits, 1e-4)
    if depths < 2:
        raise AssertionError(f"{depths} blocks")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = copy.deepcopy(model).to(dtype)
        try:
            rounded(input_ids=ids[:, :4], use_cache=False)
        except (RuntimeError, NotImplementedError) as error:
            if "lens" in str(error):
                raise
            continue  # some model types do not run in this dtype on a CPU
        detect_lens(rounded)


def _gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _compare_gradients(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    if found.keys() != true.keys():
        raise AssertionError(f"gradients of {sorted(found.keys() ^ true.keys())[:2]}")
    largest = max(x.abs().max() for x in true.values())
    for name, x in true.items():
        if not (found[name] - x).abs().max() <= 2e-3 * max(x.abs().max(), 0.05 * largest):
            raise AssertionError(f"gradient of {name}")


def check_step(model: Any, batch: dict[str, Tensor] | None = None) -> None:
    """Compare loss and gradients of a step with a float64 loss of the model's own logits."""
    teacher = other(model)
    objective = LensObjective(model, teacher, LENSES, LENSES)
    batch = batch or batch_of(model)
    found = objective(batch)
    own = _gradients(found.loss, model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    losses = []
    states = []
    for part in (model, teacher):
        with torch.set_grad_enabled(part is model):
            logits = part(**inputs, use_cache=False).logits
            hidden, _ = hidden_states(part, LENSES, inputs)
        head = lens_head_from(part).map(lambda x: x.double())
        lenses = [h if head.norm is None else head.norm.forward(h.double())[0] for h in hidden]
        lenses = [head.logits(h.double() @ head.weight.T, 1.0)[0] for h in lenses]
        states.append([x[:, :-1].double().log_softmax(-1).exp() for x in (*lenses, logits)])
    for q, p in zip(states[0][:-1], states[1][:-1], strict=True):
        losses.append(divergence("jsd", p, q, 0.5).mean() / len(LENSES))
    losses.append(divergence("reverse_kl", states[1][-1], states[0][-1], 0.5).mean())
    true = sum(losses)
    close(found.loss.detach(), true.detach(), 1e-4)
    _compare_gradients(own, _gradients(true, model))


def other(model: Any) -> Any:
    """Return a copy of the model with noise in its weights, as the teacher."""
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in teacher.parameters():
            if x.dim() > 1 and x.is_floating_point():
                x.add_(0.3 * x.std() * torch.randn(x.shape, generator=generator))
    return teacher


def check_copy(model: Any) -> None:
    """Copy all blocks except the second. ``shallow_copy`` itself checks the copy's logits."""
    blocks = len(detect_lens(model).indices)
    student = shallow_copy(model, [1, *range(3, blocks + 1)])
    if len(detect_lens(student).indices) != blocks - 1:
        raise AssertionError("the copy has another number of blocks")


@torch.no_grad()
def check_padding(model: Any) -> None:
    """Check that padding on the right does not change the hidden states of a row."""
    ids = ids_of(model)
    short = ids[:1, :7]
    padded = torch.cat([short, ids.new_full((1, 3), int(ids[0, -1]))], 1)
    mask = torch.ones_like(padded)
    mask[:, 7:] = 0
    alone = hidden_states(model, LENSES, {"input_ids": short, "attention_mask": mask[:, :7]})
    both = hidden_states(model, LENSES, {"input_ids": padded, "attention_mask": mask})
    for a, b in zip([*alone[0], alone[1]], [*both[0], both[1]], strict=True):
        close(b[:, :7], a, 1e-4)


def check_checkpointing(model: Any) -> None:
    """Check that gradient checkpointing does not change the gradients of a step."""
    objective = LensObjective(model, other(model), LENSES, LENSES)
    batch = batch_of(model)
    model.train()
    try:
        plain = _gradients(objective(batch).loss, model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _compare_gradients(_gradients(objective(batch).loss, model), plain)
    finally:
        model.eval()


def check(kind: str, group: str, names: Sequence[str] = CHECKS) -> dict[str, str]:
    """Check a model type, and return its row: ``yes`` or ``no`` for each check.

    The column ``why`` has the reasons for ``no``.
    """
    row = dict.fromkeys(CHECKS, "") | {"group": group, "type": kind, "why": ""}
    try:
        model = model_of(kind, group)
    except Exception as error:
        return {**row, "lens": "not built", "why": reason(error)}
    if model.get_output_embeddings() is not None:
        try:
            with torch.no_grad():
                model(input_ids=torch.tensor([[40, 41, 42, 43]]), use_cache=False)
        except Exception as error:
            return {**row, "lens": "not run", "why": reason(error)}
    checks: dict[str, Callable[[], None]] = {
        "lens": lambda: check_lens(model),
        "step": lambda: check_step(model),
        "copy": lambda: check_copy(model),
        "padding": lambda: check_padding(model),
        "checkpointing": lambda: check_checkpointing(model),
    }
    for name in names:
        try:
            checks[name]()
        except Exception as error:
            row[name] = "no"
            row["why"] += ("; " if row["why"] else "") + f"{name}: {reason(error)}"
            if name == "lens":
                break
        else:
            row[name] = "yes"
    return row


def reason(error: Exception) -> str:
    """Return the message of an error or its cause, without the advice after it."""
    cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
    text = " ".join(str(cause).split()).split(". If the logits")[0].split(": merge the adapter")[0]
    known = isinstance(error, (ValueError, AssertionError))
    return (text if known else f"{type(error).__name__}: {text}")[:200]


def send(kind: str, group: str, names: Sequence[str], pipe: Any) -> None:
    """Check a type and send its row through a pipe. This function runs in a process of its own."""
    torch.set_num_threads(1)
    pipe.send(check(kind, group, names))
