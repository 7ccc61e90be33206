"""Times the cross entropy of labels, loss and backward, against that of peers at one size."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support import environment, tables, timing
from benchmarks.support.contenders import first_line
from lens_kernels import __version__, linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
FLOOR = "the three GEMMs alone"
COLUMNS = "contender tokens vocab width median_ms min_ms max_ms rounds ratio_to_floor note"
HEADER = ("contender", "s", "range", "rounds", "time / three GEMMs")


def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the library's loss, without log-sum-exps and entropies."""
    loss = linear_cross_entropy(hidden, head, labels)
    assert isinstance(loss, Tensor)
    return loss


def with_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the library's loss, computed by a call that also returns the entropy of each token."""
    return linear_cross_entropy(hidden, head, labels, return_entropy=True)[0]


def dense(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the loss by plain PyTorch. Tokens without a label are dropped first."""
    kept = labels != -100
    return functional.cross_entropy((hidden[kept] @ head.t()).float(), labels[kept])


def _cut_cross_entropy() -> Loss:
    package: Any = importlib.import_module("cut_cross_entropy")
    return partial(package.linear_cross_entropy, impl="torch_compile")


def _liger() -> Loss:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    ops: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return lambda *args: ops.LigerFusedLinearCrossEntropyFunction.apply(*args)[0]


def contenders() -> dict[str, Callable[[], Loss]]:
    """Return a function that loads each contender, by the contender's title and version."""
    liger, cut = (environment.version_of(x) for x in ("liger-kernel", "cut-cross-entropy"))
    return {
        f"lens_kernels {__version__}": lambda: ours,
        f"lens_kernels {__version__}, with entropy": lambda: with_entropy,
        "dense PyTorch, autograd": lambda: dense,
        f"cut-cross-entropy {cut}, torch_compile": _cut_cross_entropy,
        f"Liger {liger} fused linear cross entropy": _liger,
    }


def run(folder: Path, device: torch.device, tokens: int, rounds: int, quick: bool = False) -> Path:
    """Check every contender against float64, time it, print the table, and write a CSV."""
    width, vocab = (24, 1000) if quick else (768, 50257)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).requires_grad_()
    head = (torch.randn(vocab, width, device=device) / width**0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)
    leaves = hidden, head

    def step(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(hidden, head, labels)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def floor() -> None:
        x, weight = hidden.detach(), head.detach()
        logits = x @ weight.t()
        logits @ weight
        logits.t() @ x

    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense(wide[0], wide[1], labels)
    truth = expected, *torch.autograd.grad(expected, wide)
    timed: dict[str, Callable[[], Any]] = {FLOOR: floor}
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for title, load in contenders().items():
        try:
            loss = load()
            for got, exact in zip(step(loss), truth, strict=True):
                if not (got - exact).abs().max() <= 1e-4 * exact.abs().max():
                    raise RuntimeError("gives a wrong result")
            timed[title] = partial(step, loss)
        except Exception as error:  # peers may raise errors of any class
            notes[title] = first_line(error)
    times = timing.time_interleaved(timed, rounds, device)
    about = environment.environment(device)
    sizes = {"tokens": tokens, "vocab": vocab, "width": width}
    for title, each in times.items():
        rows.append({"contender": title, **each.columns(floor=times[FLOOR])})
    rows += [{"contender": title, "note": note} for title, note in notes.items()]
    rows = [tables.row(f"{COLUMNS} {' '.join(about)}", row, sizes, about) for row in rows]
    path = folder / "cross_entropy_vs_peers.csv"
    tables.write_csv(path, rows)
    lines = [
        [row["contender"], f"{float(row['median_ms']) / 1e3:.2f}",
         f"{float(row['min_ms']) / 1e3:.2f} to {float(row['max_ms']) / 1e3:.2f}",
         str(row["rounds"]), str(row["ratio_to_floor"])]
        for row in rows if row["median_ms"]
    ]  # fmt: skip
    tables.print_table(HEADER, lines)
    for title, note in notes.items():
        print(f"{title}: {note}")
    return path
