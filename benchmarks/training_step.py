"""Time of a training step, and of its parts: the passes of the models, and the loss alone.

The models have the shape of SmolLM2-135M and random weights. The student has fewer blocks. The time
of the loss in the trainer is the time of a step minus the time of the models' passes. This time is
compared with that of the loss alone on hidden states of the same shape, and with dense PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, providers, tables, timing
from benchmarks.support.shapes import Inputs
from lens_kernels import distillation_loss
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from lens_kernels.hf.model.capture import hidden_states

States = list[torch.Tensor]


def parse() -> argparse.Namespace:
    """Return the parsed command-line arguments."""
    models = {"student_blocks": 20, "teacher_blocks": 30, "width": 576, "vocab": 49152, "pairs": 3}
    parser = environment.parser(__doc__, False, batch=4, length=128, **models, rounds=5)
    return parser.parse_args()


def model(args: argparse.Namespace, blocks: int) -> Any:
    """Return a Llama with the proportions of SmolLM2 and random weights."""
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
    """Return the functions to time, by name."""
    torch.manual_seed(0)
    student, teacher = model(args, args.student_blocks), model(args, args.teacher_blocks)
    ids = torch.randint(2, args.vocab, (args.batch, args.length))
    batch = {"input_ids": ids, "labels": ids}
    tokens = torch.tensor(args.batch * (args.length - 1))

    def trainer(**more: Any) -> LensDistillTrainer:
        more |= {"num_lens_pairs": args.pairs, "per_device_train_batch_size": args.batch}
        config = LensDistillConfig(folder, report_to="none", use_cpu=True, **more)
        dataset = [{"input_ids": row, "labels": row} for row in ids]
        built = LensDistillTrainer(student, teacher, config, train_dataset=dataset)
        built.create_optimizer()
        return built

    plain, cached = trainer(), trainer(teacher_cache=f"{folder}/teacher")
    objective = plain.lens_objective
    assert objective is not None

    def states(model: Any, layers: list[int]) -> States:
        hidden, final = hidden_states(model, layers, {"input_ids": ids})
        return [*hidden, final]

    @torch.no_grad()
    def teacher_alone() -> States:
        return states(teacher, objective.teacher_layers)

    def both() -> tuple[States, States]:
        return states(student, objective.student_layers), teacher_alone()

    def counted(side: States) -> States:
        return [x[:, :-1].reshape(-1, args.width) for x in side]

    example = both()
    gradients = [torch.randn_like(x) * 1e-4 for x in example[0]]
    mine, theirs = ([x.detach() for x in counted(side)] for side in example)

    def operation_alone() -> None:
        for x in mine:
            x.requires_grad_().grad = None
        hidden, heads = (mine[:-1], theirs[:-1]), objective.heads()
        out = distillation_loss(
            *hidden,
            *heads,
            student_final=mine[-1],
            teacher_final=theirs[-1],
            labels=ids[:, 1:].flatten(),
            denominator=tokens,
        )
        out.loss.backward()

    def dense_step() -> torch.Tensor:
        heads = objective.heads()
        sides = [counted(side) for side in both()]
        own, other = (
            [head.norm.forward(x)[0] for x in side[:-1]]
            for head, side in zip(heads, sides, strict=True)
            if head.norm is not None
        )
        lens = providers.dense(Inputs(own, other, heads[0].weight, heads[1].weight))
        log_q = (sides[0][-1] @ heads[0].weight.T).log_softmax(-1)
        with torch.no_grad():
            log_p = (sides[1][-1] @ heads[1].weight.T).log_softmax(-1)
        loss = lens + (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        loss.backward()
        return loss.detach()

    def fresh(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            student.zero_grad(set_to_none=True)
            return function()

        return call

    numbered = batch | {"example_id": torch.arange(args.batch)}
    return {
        "trainer step": fresh(lambda: plain.training_step(student, dict(batch), tokens)),
        "trainer step, teacher cached": fresh(
            lambda: cached.training_step(student, dict(numbered), tokens)
        ),
        "models alone": fresh(lambda: torch.autograd.backward(both()[0], gradients)),
        "teacher alone": teacher_alone,
        "operation alone": fresh(operation_alone),
        "dense step": fresh(dense_step),
    }


def main() -> None:
    """Time the functions, print the share of each part, and write the CSV."""
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
    of_operation, of_teacher = lens / median["operation alone"], saved / median["teacher alone"]
    print(f"\nlens in the trainer: {lens / 1e3:.3f} s, {of_operation:.2f} of the operation alone")
    print(f"saved by the cache: {saved / 1e3:.3f} s, {of_teacher:.2f} of the teacher alone")
    for name in ("trainer step", "dense step"):
        print(f"share of the loss in a {name}: {1 - models / median[name]:.0%}")
    shape = {k: v for k, v in vars(args).items() if k != "out"}
    where = environment.environment(environment.CPU)
    tables.write_csv(args.out / "training_step.csv", [row | shape | where for row in rows])


if __name__ == "__main__":
    main()
