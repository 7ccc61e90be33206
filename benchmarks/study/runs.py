"""Executes the runs of the study. Each run is independent, and writes one line of a CSV."""

from __future__ import annotations

import csv
import fcntl
import functools
import io
import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Run, TeacherSettings
from benchmarks.support import environment, tables

EVALUATIONS = 12  # the number of evaluations in a run, at equal intervals
SETTINGS = [f.name for f in fields(Run)]
METRICS = "kl reverse_kl ce entropy agreement overconfident calibration_error greedy_prefix".split()
COLUMNS = [
    *("key", *SETTINGS),
    *METRICS,
    *("curve", "by_depth"),  # columns in JSON: the KL by step, and metrics of the lenses by depth
    *("cpu_ms_per_step", "seconds", "shared_machine"),
    *("device", "threads", "torch", "transformers", "python", "commit", "date_utc"),
]


def append(path: Path, values: dict[str, Any]) -> None:
    """Append a result to the CSV as one line.

    A lock prevents several processes from writing at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(values)
        file.write(text.getvalue())


def rows(path: Path) -> list[dict[str, str]]:
    """Return the lines of the CSV. Results older than a setting have its default."""
    defaults = {name: str(getattr(Run(), name)) for name in SETTINGS}
    found = tables.read_csv(path)
    return [{x: row.get(x, defaults.get(x, "")) for x in COLUMNS} for row in found]


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the lines of a CSV with the results of one machine, by the key of their run."""
    return {row["key"]: row for row in rows(path)}


@functools.lru_cache(maxsize=2)
def _teacher_and_judge(settings: TeacherSettings, folder: Path) -> tuple[Any, Any]:
    from benchmarks.study import data, judge, models

    teacher = models.load_teacher(settings, folder)
    held_out = data.load(settings, folder).held_out
    return teacher, judge.Judge.of(teacher, held_out)


def _make_teacher(settings: TeacherSettings, folder: Path) -> None:
    from benchmarks.study import models

    models.load_teacher(settings, folder)


def one(run: Run, folder: Path, shared_machine: bool) -> dict[str, Any]:
    """Execute a run, and return its result as a line of the CSV."""
    from benchmarks.study import data, models

    teacher, judge = _teacher_and_judge(run.teacher, folder)
    student = models.new_student(run, teacher)
    curve: dict[int, float] = {}
    every = -(-run.steps // EVALUATIONS)

    def at_step(step: int) -> None:
        if step % every == 0 or step == run.steps:
            curve[step] = round(judge.forward_kl(student), 6)

    started = time.perf_counter()
    text = data.load(run.teacher, folder).train
    cpu_ms = models.train(student, teacher, run, text, folder, at_step)
    final, lenses = judge.final(student), judge.by_depth(student)
    student.save_pretrained(folder / "students" / run.key)  # kept for later evaluations
    found = environment.environment(environment.CPU)
    found["transformers"] = environment.version_of("transformers")
    return {
        "key": run.key,
        **{k: json.dumps(v) if isinstance(v, dict | tuple) else v for k, v in asdict(run).items()},
        **{name: f"{value:.6g}" for name, value in final.items()},
        "curve": json.dumps(curve),
        "by_depth": json.dumps([_short(each) for each in lenses]),
        "cpu_ms_per_step": round(cpu_ms, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "shared_machine": shared_machine,
        **{name: value for name, value in found.items() if name in COLUMNS},
    }


def _short(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def _prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def do(runs: Iterable[Run], folder: Path, jobs: int, threads: int, shared_machine: bool) -> None:
    """Execute all missing runs in order, and write each result when its run ends."""
    path = folder / "runs.csv"
    known = read(path)
    wanted = list({run.key: run for run in runs if run.key not in known}.values())
    if not wanted:
        return
    if known and [*tables.read_csv(path)[0]] != COLUMNS:
        tables.write_csv(path, [*known.values()])  # the file is older than some of the columns
    started = time.perf_counter()
    # New processes are spawned, because a forked process would not have torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _prepare, (threads,)) as pool:
        for settings in dict.fromkeys(run.teacher for run in wanted):
            pool.submit(_make_teacher, settings, folder).result()
            print(f"{_minutes(started)}  teacher {settings.key} is ready", flush=True)
        futures: dict[Future[dict[str, Any]], Run] = {
            pool.submit(one, run, folder, shared_machine): run for run in wanted
        }
        failed = []
        for number, future in enumerate(as_completed(futures), 1):
            begin = f"{_minutes(started)}  {number} of {len(wanted)}: {describe(futures[future])}"
            if error := future.exception():
                failed.append(error)
                print(f"{begin}  FAILED: {error!r}", flush=True)
                continue
            result = future.result()
            append(path, result)
            end = f"KL {float(result['kl']):.4f}, {result['seconds']:.0f} s"
            print(f"{begin}  {end}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} runs failed") from failed[0]


def describe(run: Run) -> str:
    """Return a text with the settings that differ from their defaults."""
    plain = Run()
    names = [name for name in SETTINGS if getattr(run, name) != getattr(plain, name)]
    return " ".join(f"{name}={getattr(run, name)}" for name in names) or "defaults"


def _minutes(started: float) -> str:
    return f"{(time.perf_counter() - started) / 60:6.1f} min"
