"""Does a lens help? One student trained by six objectives, some seeds each, on the same data.

Every run starts from the same blocks of SmolLM2-135M-Instruct and sees the same number of examples
in an order that its seed decides. All are judged alike on held-out rows. A run that is in the CSV
already is not repeated: the same command resumes an interrupted study.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, plot, tables

# Of 30 blocks those whose loss is mended soonest: without 12 to 19 the cross entropy doubles, and
# after 20 steps half of that is made good; other eight cost up to twice as much.
BLOCKS = [*range(1, 12), *range(20, 31)]
STUDENT_LAYERS, TEACHER_LAYERS = [7, 15], [10, 20]  # the uniform rule for two pairs
# The weight of MSE makes its term about as large as the lens term when training begins.
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {"kd_ratio": 0.0},
    "KD": {"lens_coeff": 0.0},
    "KD + hidden MSE": {"lens_coeff": 0.0, "mse_coeff": 1e-2},
    "KD + forward-KL lens": {"lens_divergence": "forward_kl"},
    "KD + JSD lens": {},
    "KD + JSD lens, no norm": {"lens_norm": False},
}
METRICS = {
    "ce": "held-out CE",
    "forward_kl": "KL(teacher, student)",
    **{f"lens_{i}": f"lens JSD, block {i}" for i in STUDENT_LAYERS},
    "rouge_l": "ROUGE-L",
}


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--train", required=True, help="JSON lines to train on")
    parser.add_argument("--eval", required=True, help="JSON lines to judge on")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="examples of a step")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--eval-rows", type=int, default=80, help="rows that are judged on")
    parser.add_argument("--rouge-rows", type=int, default=40, help="rows that are answered")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--output", type=Path, default=environment.OUT / "study")
    parser.add_argument("--csv", type=Path, default=environment.DATA / "cpu" / "study.csv")
    figure = environment.ROOT / "benchmarks" / "figures" / "study.png"
    parser.add_argument("--figure", type=Path, default=figure)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def folder_of(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return the folder of a run."""
    return args.output / f"{list(ARMS).index(arm)}-{seed}"


def train(args: argparse.Namespace, arm: str, seed: int) -> float:
    """Train one student as a user would, and return the seconds that took."""
    from lens_kernels.hf.training import command

    given = {
        "student": args.model,
        "train": args.train,
        "output": folder_of(args, arm, seed),
        "student_blocks": BLOCKS,
        "student_layers": STUDENT_LAYERS,
        "teacher_layers": TEACHER_LAYERS,
        "final_divergence": "forward_kl",
        "prompt_style": "chat",
        "max_length": 256,
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, args.steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 5,
        "seed": seed,
    }
    if arm != "SFT":
        given |= {"teacher": args.model, "teacher_cache": args.output / "teacher"}
    given |= ARMS[arm]
    values = [(f"--{k}", *(v if isinstance(v, list) else [v])) for k, v in given.items()]
    argv = [str(each) for option in values for each in option]
    started = time.perf_counter()
    command.train(*command.parse(argv), lambda text: print(text, flush=True))
    return time.perf_counter() - started


def judge(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the metrics of a student: the same for all, whatever it was trained by."""
    from lens_kernels.hf.evaluation.generation import evaluate_rouge
    from lens_kernels.hf.model.loading import load_model, load_tokenizer
    from lens_kernels.hf.training.data import Collator, load_examples, padding_id, read_rows
    from lens_kernels.hf.training.meter import evaluate
    from lens_kernels.hf.training.objective import LensObjective

    student, teacher = load_model(str(folder), "float32"), load_model(args.model, "float32")
    tokenizer = load_tokenizer(str(folder))
    data = load_examples(args.eval, tokenizer, prompt_style="chat", max_length=256)
    collate = Collator(padding_id(tokenizer))
    layers = STUDENT_LAYERS, TEACHER_LAYERS
    objective = LensObjective(student, teacher, *layers, final_divergence="forward_kl")
    total = min(len(data), args.eval_rows)
    batches = (range(i, min(i + 8, total)) for i in range(0, total, 8))
    means = evaluate(objective, (collate([data[i] for i in rows]) for rows in batches))
    metrics = {k: means[k] for k in METRICS if k in means} | {"forward_kl": means["kd"]}
    rouge = evaluate_rouge(
        student,
        tokenizer,
        read_rows(args.eval)[: args.rouge_rows],
        prompt_style="chat",
        do_sample=False,
        max_new_tokens=40,
        batch_size=20,
        no_repeat_ngram_size=6,
    )
    return metrics | {"rouge_l": rouge.mean}


def one(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Do one run and write its row to a file of its own."""
    seconds, folder = train(args, arm, seed), folder_of(args, arm, seed)
    row = {"arm": arm, "seed": seed, "steps": args.steps, "examples_per_step": args.batch}
    row |= {"learning_rate": args.learning_rate, **judge(args, folder)}
    row |= {"train_seconds": round(seconds, 1), **environment.environment(environment.CPU)}
    (folder / "row.json").write_text(json.dumps(row))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return mean and standard deviation of every metric by objective, as Markdown."""
    lines = []
    for arm in (arm for arm in ARMS if any(row["arm"] == arm for row in rows)):
        cells = [arm]
        for name in METRICS:
            values = [float(row[name]) for row in rows if row["arm"] == arm]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        lines.append(cells)
    return tables.markdown_table(["objective", *METRICS.values()], lines)


def main() -> None:
    """Run what is missing, then print the table and draw."""
    args = parse()
    if args.one:
        one(args, args.one[0], int(args.one[1]))
        return
    done: list[dict[str, Any]] = [*tables.read_csv(args.csv)]
    known = {(row["arm"], int(row["seed"])) for row in done}
    wanted = [(arm, seed) for seed in args.seeds for arm in ARMS if (arm, seed) not in known]
    # The first run with a teacher writes its states, which the others then only read.
    first = next((x for x in wanted if x[0] != "SFT"), None)
    started, total = time.perf_counter(), len(done) + len(wanted)

    def work(task: tuple[str, int]) -> None:
        folder = folder_of(args, *task)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *sys.argv, "--one", *map(str, task)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | threads)
        done.append(json.loads((folder / "row.json").read_text()))
        tables.write_csv(args.csv, done)
        minutes = (time.perf_counter() - started) / 60
        print(f"{minutes:5.1f} min  {len(done):2d} of {total}: {task[0]}, {task[1]}")

    if first is not None:
        work(first)
        wanted.remove(first)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, wanted))
    print(table(done))
    print(plot.study(args.csv, METRICS, list(ARMS), png=args.figure))


if __name__ == "__main__":
    main()
