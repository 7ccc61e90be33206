"""Command lines of ``lens-kernels train`` for tiny models, and readers for the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lens_kernels import cli
from lens_kernels.hf import LensDistillTrainer
from lens_kernels.hf.model.loading import load_model

WORDS = ["a cat sat", "the dog ran off", "no", "an old hat", "we sing at noon", "fish swim", "up"]
ROWS = [{"prompt": word, "completion": word[::-1]} for word in WORDS]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(files: Path, output: Path, **options: Any) -> list[str]:
    """Return the command line of a short training run. Options with the value None are left out."""
    given = {
        "student": files / "student",
        "teacher": files / "teacher",
        "data": files / "train.jsonl",
        "output": output,
        "num_lens_pairs": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | options
    argv = ["train"]
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def first_loss(files: Path, output: Path, **options: Any) -> float:
    argv = arguments(files, output, max_steps=1, save_strategy="no", **options)
    assert cli.main(argv) == 0
    return json.loads((output / "metrics.json").read_text())["train_loss"]


def interrupt(monkeypatch: Any, argv: list[str], before_step: int) -> None:
    """Run the command until a training step, and interrupt it there."""
    calls = []
    step = LensDistillTrainer.training_step

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == before_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LensDistillTrainer, "training_step", cut)
        assert cli.main(argv) == 130


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(str(folder)).state_dict()


def assert_same_student(one: Path, other: Path, error: float = 0.0) -> None:
    """Check that the weights in two folders differ by at most ``error``."""
    expected, found = weights(one), weights(other)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=error, msg=name)
