"""What a step of the trainer costs beside its parts: the models' passes, and the loss alone.

Models have SmolLM2-135M's shape with random weights; a student of some of its blocks. The trainer's
step less the models' own passes is what the lens costs there. It is compared with the operation
alone on hidden states of the same shape. Dense PyTorch in its place shows what it replaces.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, tables, timing
from lens_kernels import distillation_loss
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from lens_kernels.hf.model.capture import hidden_states

States = list[torch.Tensor]


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example, all counted")
    parser.add_argument("--student-blocks", type=int, default=20)
    parser.add_argument("--teacher-blocks", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    output = environment.DATA / "cpu" / "training_step.csv"
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def model(args: argparse.Namespace, blocks: int) -> Any:
    """Return a Llama of SmolLM2's proportions with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 192),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def jobs(args: argparse.Namespace, folder: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    torch.manual_seed(0)
    student, teacher = model(args, args.student_blocks), model(args, args.teacher_blocks)
    ids = torch.randint(2, args.vocab, (args.batch, args.length))
    inputs = {"input_ids": ids, "labels": ids}
    dataset = [{"input_ids": row, "labels": row} for row in ids]

    def trainer_with(**more: str) -> LensDistillTrainer:
        config = LensDistillConfig(
            output_dir=folder,
            num_lens_pairs=args.pairs,
            per_device_train_batch_size=args.batch,
            report_to="none",
            use_cpu=True,
            **more,
        )
        built = LensDistillTrainer(student, teacher, config, train_dataset=dataset)
        built.create_optimizer()
        return built

    trainer = trainer_with()
    cached_trainer = trainer_with(teacher_cache=f"{folder}/teacher")
    objective = trainer.objective
    assert objective is not None
    tokens = torch.tensor(args.batch * (args.length - 1))
    layers = objective.student_layers, objective.teacher_layers

    @torch.no_grad()
    def teacher_alone() -> States:
        hidden, final = hidden_states(teacher, layers[1], {"input_ids": ids})
        return [*hidden, final]

    def passes() -> tuple[States, States]:
        theirs = teacher_alone()
        hidden, final = hidden_states(student, layers[0], {"input_ids": ids})
        return [*hidden, final], theirs

    both = passes()
    gradients = [torch.randn_like(x) * 1e-4 for x in both[0]]
    mine, theirs = ([x.detach()[:, :-1].reshape(-1, args.width) for x in side] for side in both)

    def models_alone() -> None:
        torch.autograd.backward(passes()[0], gradients)

    def operation_alone() -> None:
        for x in mine:
            x.requires_grad_().grad = None
        distillation_loss(
            mine[:-1],
            theirs[:-1],
            *objective.heads(),
            student_final=mine[-1],
            teacher_final=theirs[-1],
            labels=ids[:, 1:].flatten(),
            denominator=tokens,
        ).loss.backward()

    def trainer_step() -> torch.Tensor:
        return trainer.training_step(student, dict(inputs), tokens)

    def cached_step() -> torch.Tensor:
        numbered = {**inputs, "example_id": torch.arange(args.batch)}
        return cached_trainer.training_step(student, numbered, tokens)

    def dense_step() -> torch.Tensor:
        total = torch.zeros(())
        heads = objective.heads()
        for i, (x, y) in enumerate(zip(*passes(), strict=True)):
            last = i == args.pairs
            with torch.no_grad():
                log_p = _log_probabilities(heads[1], y, last)
            log_q = _log_probabilities(heads[0], x, last)
            if last:
                total = total + (log_q.exp() * (log_q - log_p)).sum() / tokens
                continue
            log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
            jsd = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() / 2
            total = total + jsd / tokens / args.pairs
        total.backward()
        return total.detach()

    def fresh(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            student.zero_grad(set_to_none=True)
            return function()

        return call

    return {
        "trainer step": fresh(trainer_step),
        "trainer step, teacher cached": fresh(cached_step),
        "models alone": fresh(models_alone),
        "teacher alone": teacher_alone,
        "operation alone": fresh(operation_alone),
        "dense step": fresh(dense_step),
    }


def _log_probabilities(head: Any, hidden: torch.Tensor, normed_already: bool) -> torch.Tensor:
    rows = hidden[:, :-1]
    if not normed_already:
        rows = head.norm.forward(rows)[0]
    return (rows @ head.weight.T).log_softmax(-1)


def main() -> None:
    """Time, print the shares and write the CSV."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        timed = jobs(args, folder)
        ours = timed["trainer step"]()
        for name in ("dense step", "trainer step, teacher cached"):
            torch.testing.assert_close(timed[name](), ours, rtol=1e-4, atol=0)
        timings = timing.time_interleaved(timed, args.rounds, environment.CPU)
    rows = []
    for name, times in timings.items():
        found = times.columns(1)
        ends = {"low_ms": found["min_ms"], "high_ms": found["max_ms"]}
        rows.append({"what": name, "median_ms": found["median_ms"], **ends})
    tables.print_rows(rows)
    median = {name: times.median_ms for name, times in timings.items()}
    step, models = median["trainer step"], median["models alone"]
    lens, saved = step - models, step - median["trainer step, teacher cached"]
    print(f"\nlens in the trainer, less the models: {lens / 1e3:.3f} s,", end=" ")
    print(f"{lens / median['operation alone']:.2f} of the operation alone")
    print(f"saved by the cache: {saved / 1e3:.3f} s,", end=" ")
    print(f"{saved / median['teacher alone']:.2f} of the teacher alone")
    for name in ("trainer step", "dense step"):
        print(f"share of the loss in a {name}: {1 - models / median[name]:.0%}")
    shape = {k: v for k, v in vars(args).items() if k != "output"}
    where = environment.environment(environment.CPU)
    tables.write_csv(args.output, [row | shape | where for row in rows])


if __name__ == "__main__":
    main()
