"""Short trainings of tiny models: data, trainers without shuffling, and comparisons of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import SequentialSampler

from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from tests.support import tiny

STUDENT = {"layers": 3, "seed": 1}
TEACHER = {"layers": 4, "width": 24, "seed": 2}

# Options of a short run in which each step changes the weights a lot.
RUN: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "num_lens_pairs": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class InOrder(LensDistillTrainer):
    """A trainer that does not shuffle its data, for transformers versions without this option."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def tokens(batch: int = 8, length: int = 10, vocab: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab, (batch, length), generator=generator)


def uneven_data() -> list[dict[str, torch.Tensor]]:
    """Return examples with different numbers of labels.

    The loss uses only one label of the first example.
    """
    ids = tokens()
    labels = ids.clone()
    for row, kept in enumerate((2, 10, 5, 10, 3, 9, 10, 4)):
        labels[row, kept:] = -100
    return [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]


def batch_of(examples: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the labels of equally long examples, as two tensors."""
    ids, labels = (torch.stack([x[key] for x in examples]) for key in ("input_ids", "labels"))
    return ids, labels


def make_trainer(
    folder: Any,
    batch: int = 4,
    accumulate: int = 1,
    data: Any = None,
    eval_data: Any = None,
    student: Any = None,
    teacher: Any = True,
    kind: type[LensDistillTrainer] = InOrder,
    **options: Any,
) -> LensDistillTrainer:
    """Return a trainer for a tiny student.

    ``teacher`` is a model, True for a tiny model, or False for none.
    """
    config = LensDistillConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        **RUN | options,
    )
    if isinstance(teacher, bool):
        teacher = tiny.model(**TEACHER) if teacher else None
    return kind(
        tiny.model(**STUDENT) if student is None else student,
        teacher,
        config,
        train_dataset=uneven_data() if data is None else data,
        eval_dataset=(uneven_data() if eval_data is None else eval_data)[:3],
    )


def trained(folder: Any, **options: Any) -> LensDistillTrainer:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def with_lora(student: Any) -> Any:
    """Return a student with a LoRA adapter, all of whose weights are random."""
    from peft import LoraConfig, get_peft_model

    modules = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=2, init_lora_weights=False, **modules)
    return get_peft_model(student, config)


def weights(trainer: LensDistillTrainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}


def logged(trainer: LensDistillTrainer, key: str = "loss", having: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if having in entry]


def assert_same_step(start: Any, one: Any, other: Any, relative: float = 1e-5) -> None:
    """Check that two trainings from ``start`` give the same weights, ``one`` and ``other``.

    The error is relative to the distance between ``one`` and ``start``.
    """
    moved = 0.0
    for name, x in one.items():
        step = (x - start[name]).abs().max().item()
        moved = max(moved, step)
        assert (x - other[name]).abs().max().item() <= relative * max(step, 1e-3), name
    assert moved > 1e-2
