"""The training program of test_distributed.py, which runs on each rank.

The command is ``python -m torch.distributed.run ... -m tests.support.distributed_run CASES
FOLDER``. CASES is a JSON file with the arguments of ``train_case`` for each named case. Each rank
writes its results into FOLDER.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from lens_kernels.hf import LensDistillTrainer
from lens_kernels.hf.cache import store
from lens_kernels.hf.training import entropy, objective
from tests.support import tiny
from tests.support.training import make_trainer, uneven_data, with_lora

HANG = 1200  # a rank hangs if it runs for more seconds
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False}


@dataclasses.dataclass
class Result:
    """The result of a case: parameters before and after training, and logs.

    ``teacher_ran`` is the number of examples that the teacher has read.
    """

    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    logs: list[dict[str, float]]
    teacher_ran: int

    def save(self, stem: Path) -> None:
        parts = {"start": self.start, "end": self.end}
        flat = {f"{part}/{name}": x for part, xs in parts.items() for name, x in xs.items()}
        save_file(flat, stem.with_suffix(".safetensors"))
        stem.with_suffix(".json").write_text(json.dumps([self.logs, self.teacher_ran]))

    @classmethod
    def load(cls, stem: Path) -> Result:
        logs, teacher_ran = json.loads(stem.with_suffix(".json").read_text())
        parts: dict[str, dict[str, torch.Tensor]] = {"start": {}, "end": {}}
        for key, x in load_file(stem.with_suffix(".safetensors")).items():
            part, name = key.split("/", 1)
            parts[part][name] = x
        return cls(parts["start"], parts["end"], logs, teacher_ran)


def train_case(
    folder: Path,
    rows: int = 4,
    accumulate: int = 1,
    unlabelled: tuple[int, ...] = (),
    student: dict[str, Any] | None = None,
    lora: bool = False,
    cache: bool = False,
    one_node_each: bool = False,
    fsdp: bool = False,
    resumed: bool = False,
    evaluate_first: bool = False,
    sharded: bool = False,
    split: bool = False,
    resume_from: str | None = None,
    kill: tuple[int, int] | None = None,
    **options: Any,
) -> Result:
    """Train a tiny student. In each step, all ranks together process ``rows`` examples.

    ``kill`` is the rank that is killed, and at which batch of its teacher. A shard of the teacher's
    cache has two examples.
    """
    state = accelerate.PartialState(cpu=True)
    processes, self_rank = state.num_processes, state.process_index
    ran = []

    def counting(self: Any, inputs: Any, counted: torch.Tensor) -> list[torch.Tensor]:
        ran.append(len(inputs["input_ids"]))
        if kill is not None and [*kill] == [self_rank, len(ran)]:
            os.kill(os.getpid(), signal.SIGKILL)
        return teacher_rows(self, inputs, counted)

    teacher_rows = objective.LensObjective.teacher_rows
    data = uneven_data()
    for row in unlabelled:
        data[row]["labels"] = torch.full_like(data[row]["labels"], -100)
    if cache:
        options["teacher_cache"] = str(folder / "cache")
    build = functools.partial(store.TeacherCache.build, shard_examples=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective.LensObjective, "teacher_rows", counting)
        patch.setattr(store.TeacherCache, "build", build)
        # Compute the entropies of all tokens, because a sample of tokens would depend on the batch.
        patch.setattr(entropy, "STRIDE", 1)
        # Make each rank believe that it is alone on its machine. The machines share a disk.
        if processes > 1 and one_node_each:
            patch.setenv("LOCAL_RANK", "0")
        if processes > 1 and fsdp:
            options |= {"fsdp": True, "fsdp_config": FSDP}
            # transformers sets these environment variables only from version 5 on.
            patch.setenv("FSDP_VERSION", "2")
            kind = "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT"
            patch.setenv("FSDP_STATE_DICT_TYPE", kind)
            options["fsdp_config"] = FSDP | {"state_dict_type": kind}
            _let_accelerate_shard(patch)
        if split:  # the batch size is then that of all ranks
            options["accelerator_config"] = {"split_batches": True}
        if resumed:
            options |= {"save_strategy": "steps", "save_steps": 1}

        def make() -> LensDistillTrainer:
            model = tiny.model(**{"layers": 3, "seed": 7, **(student or {})})
            return make_trainer(
                folder,
                batch=rows // accumulate // (1 if split else processes),
                accumulate=accumulate,
                data=data,
                student=with_lora(model) if lora else model,
                **{"kd_ratio": 0.5, "mse_coeff": 0.01, **options},
                ddp_timeout=HANG,
            )

        trainer = make()
        start = _whole(trainer)
        if evaluate_first:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume_from)
        if resumed:
            trainer = make()
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        trainer.evaluate()
    spread = any(isinstance(x, DTensor) for x in trainer.model.state_dict().values())
    assert spread == (processes > 1 and fsdp)
    return Result(start, _whole(trainer), trainer.state.log_history, sum(ran))


def _let_accelerate_shard(patch: pytest.MonkeyPatch) -> None:
    """Enable FSDP on a CPU, where accelerate would silently use DDP instead."""
    make = LensDistillTrainer.create_accelerator_and_postprocess

    def make_sharding(self: Any) -> None:
        accelerate.PartialState().distributed_type = accelerate.DistributedType.MULTI_GPU
        make(self)

    patch.setattr(LensDistillTrainer, "create_accelerator_and_postprocess", make_sharding)


def _whole(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of the student and of the MSE matrices, without sharding."""
    state = dict(trainer.model.state_dict())
    if trainer.lens_objective is not None:
        state |= trainer.lens_objective.projections.state_dict(prefix="learnt.")
    whole = {}
    for name, x in state.items():
        whole[name] = (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
    return whole


def main() -> None:
    torch.set_num_threads(1)
    # Make garbage collection skip all loaded objects, to save time.
    gc.freeze()
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = accelerate.PartialState(cpu=True).process_index
    for name, arguments in cases.items():
        train_case(folder / name, **arguments).save(folder / f"{name}-{rank}")
    gc.unfreeze()


if __name__ == "__main__":
    main()
