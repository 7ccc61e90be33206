"""Size on disk of each kind of teacher cache, and CPU time of a training epoch from it.

The teacher is SmolLM2-135M-Instruct. The student has some of its blocks. All runs train on the same
examples with one thread. CPU time is reported, because it depends less on other programs. The load
average of the machine shows how many of these ran.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, tables
from lens_kernels import cache as user_cache
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer, shallow_copy
from lens_kernels.hf.cache.key import CacheKey, counted_positions
from lens_kernels.hf.cache.targets import TargetCache
from lens_kernels.hf.model.smollm2 import smollm2
from lens_kernels.hf.training.cache_command import make_cache
from lens_kernels.hf.training.data import load_examples

COLUMNS = (
    "teacher lens_pairs examples tokens mib bytes_a_token build_cpu_s epoch_cpu_s"
    " load_average device threads torch python commit date_utc"
)
TOP = 20
# The options of training from sparse targets, and of each run without lens pairs.
FINAL_ONLY: dict[str, Any] = {"num_lens_pairs": 0, "final_divergence": "forward_kl"}


def parse() -> argparse.Namespace:
    """Return the parsed command-line arguments."""
    sizes = {"examples": 24, "batch": 2, "length": 96, "blocks": 6, "pairs": 3}
    parser = environment.parser(__doc__, False, **sizes)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON Lines to train on")
    return parser.parse_args()


def folder_size(folder: Path) -> int:
    """Return the size of all files in a folder in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_logprobs(cache: TargetCache, examples: Any, file: Path) -> None:
    """Write the targets of a cache as records of log-probabilities."""
    with file.open("w", encoding="utf-8") as out:
        for i in range(len(examples)):
            targets = cache.targets([i])
            positions = counted_positions(examples[i]["labels"])
            rows = zip(positions, targets.token_ids, targets.probabilities.log(), strict=True)
            for position, ids, logs in rows:
                record = {"example": i, "position": int(position)}
                record |= {"ids": ids.tolist(), "logprobs": logs.clamp(max=0).tolist()}
                out.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Return a row for each kind of teacher."""
    teacher, tokenizer = smollm2(user_cache.folder())
    data = work / "data.jsonl"
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()[: args.examples]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lengths = {"max_length": args.length, "max_prompt_length": args.length * 2 // 3}
    examples: Any = load_examples(str(data), tokenizer, **lengths)
    tokens = sum(len(counted_positions(examples[i]["labels"])) for i in range(len(examples)))
    blocks = [1 + round(i * 29 / (args.blocks - 1)) for i in range(args.blocks)]
    student = shallow_copy(teacher, blocks)
    at = environment.environment(environment.CPU)
    rows: list[dict[str, Any]] = []

    def train(teacher: Any, steps: int, options: dict[str, Any]) -> float:
        """Return the CPU time of training, without the time of building a cache of states."""
        config = LensDistillConfig(
            str(work / "run"), num_train_epochs=1, max_steps=steps, use_cpu=True, report_to="none",
            per_device_train_batch_size=args.batch, save_strategy="no", disable_tqdm=True,
            logging_strategy="no", **options,
        )  # fmt: skip
        made = LensDistillTrainer(
            student, teacher, config, train_dataset=examples, processing_class=tokenizer
        )
        start = time.process_time()
        made.train()
        return time.process_time() - start

    def add(
        name: str, teacher: Any, options: dict[str, Any], folder: Path | None = None,
        build: float | None = None,
    ) -> None:  # fmt: skip
        """Add the row of a kind of teacher. A cache without the time of its build is built here."""
        start = time.process_time()
        first = train(teacher, 1, options)  # compiles the pass, and builds a cache of hidden states
        if build is None:
            build = time.process_time() - start - first if folder else 0.0
        epoch, pairs = train(teacher, -1, options), options.get("num_lens_pairs", 0)
        size = folder_size(folder) if folder else 0
        found = {"teacher": name, "lens_pairs": pairs, "examples": len(examples), "tokens": tokens}
        found |= {"mib": round(size / 2**20, 3), "bytes_a_token": round(size / tokens)}
        found |= {"build_cpu_s": round(build, 1), "epoch_cpu_s": round(epoch, 1)}
        found |= {"load_average": round(os.getloadavg()[0], 1)}
        rows.append(tables.row(COLUMNS, found, at))
        print(rows[-1], flush=True)  # noqa: T201  progress

    compared = FINAL_ONLY, {"num_lens_pairs": args.pairs}
    add("none", None, {"kd_ratio": 0.0})
    for options in compared:
        add("in memory", teacher, options)
    for options in compared:
        folder = work / f"states{options['num_lens_pairs']}"
        add("hidden states", teacher, {**options, "teacher_cache": str(folder)}, folder)
    given = {
        "teacher": str(user_cache.folder() / "SmolLM2-135M-Instruct"),
        "batch_size": args.batch,
    }
    given |= {**lengths, "say": lambda text: None}
    for kind in ("sampled", "topk", "logprobs"):
        folder, more = work / kind, dict(given)
        if kind == "logprobs":
            key = CacheKey.of(None, examples, (), tokenizer)
            file = work / "logprobs.jsonl"
            write_logprobs(TargetCache.read(work / "topk" / "train", key), examples, file)
            more |= {"logprobs": file, "teacher": None, "tokenizer": given["teacher"]}
        start = time.process_time()
        make_cache(kind, str(data), folder, top_k=TOP, **more)
        build = time.process_time() - start
        name = {"sampled": "50 samples", "topk": f"top {TOP}"}.get(kind, kind)
        add(name, None, {"teacher_targets": str(folder), **FINAL_ONLY}, folder, build)
    return rows


def main() -> None:
    """Measure all kinds, and write the CSV."""
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(args, Path(work))
    tables.write_csv(args.out / "teacher_caches.csv", rows)


if __name__ == "__main__":
    main()
