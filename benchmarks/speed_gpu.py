"""Time and peak memory on a GPU at the size of one model, compared with the floor and peers.

    python benchmarks/speed_gpu.py llama3 --contenders torch liger
    python benchmarks/speed_gpu.py qwen2.5 --pairs 1 5 --parts     also the time of each kernel

``gpu_day.py`` runs this script for several models, each in a fresh process. A step computes loss
and gradients. Times come from CUDA events: the median, fastest and slowest of interleaved rounds.
The peak memory includes the gradients but not the inputs. The loss needs four GEMMs: one for the
logits of each model, and two for the gradients. The floor is the time of these four GEMMs by
``torch.mm``, without TF32. The column ``predicted_ms`` holds the prediction for an H100 by
``prediction.py``.

Rows are added to ``speed.csv`` as soon as they are known. If a contender fails, or does not fit
into memory, its row has the reason. A backend of the library that gives a wrong result is measured
with a note. The exit status is 77 if several contenders are chosen, but only ``torch`` can run.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import (
    environment,
    memory,
    prediction,
    products,
    providers,
    shapes,
    tables,
    timing,
)
from benchmarks.support.contenders import Contender, first_line, gather, step
from lens_kernels import plan

TINY = shapes.Model("tiny", 24, 40, 300)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FLOOR = "floor"
OURS = {key: providers.backend(key) for key in ("torch", "triton")}
CONTENDERS = OURS | providers.PEERS | providers.GPU_PEERS
FILE = "speed.csv"
SKIPPED = 77
REPEATS = 10  # a single GEMM is too short to time, so it is repeated
COLUMNS = (
    "shape part contender label tokens pairs vocab_entries student_width teacher_width dtype"
    " median_ms min_ms max_ms ratio_to_floor predicted_ms tflop_per_s peak_with_gradients_mib"
    " gradients_mib rounds note"
)
SHOWN = (
    "shape part contender tokens pairs median_ms ratio_to_floor predicted_ms tflop_per_s"
    " peak_with_gradients_mib note"
)
# A step has three parts. Patterns recognise the part of a kernel by its name. Names of CPU kernels
# are for tests.
PART_NAMES = {
    "products": re.compile("gemm|nvjet|cutlass|xmma|splitk|aten::(add)?mm", re.IGNORECASE),
    "pass": re.compile("(row|cluster)_pass_kernel|triton_"),
    "rest": re.compile(""),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return 1 if a backend of the library failed."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and (reason := environment.no_gpu()):
        raise SystemExit(f"speed_gpu.py: {reason}")
    measured = Measured(args, device)
    if not measured.choose(args.contenders):
        return SKIPPED
    for pairs in args.pairs:
        job = measured.model.job(args.tokens, pairs=pairs, dtype=DTYPES[args.dtype], device=device)
        print(job, flush=True)
        try:
            measured.job(job, job.make(), args.parts)
        except torch.OutOfMemoryError as error:
            measured.add("inputs", job, note=first_line(error))
    tables.print_rows(measured.rows, SHOWN.split())
    return int(any(row["note"] and row["contender"] in ("inputs", *OURS) for row in measured.rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command-line arguments. ``--tiny`` overrides the sizes."""
    parser = environment.parser(__doc__, tokens=8192, rounds=10)
    parser.add_argument("shape", choices=shapes.MODELS)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["torch"])
    parser.add_argument(
        "--parts", action="store_true", help="also time the kernels, and GEMMs of the tiles' size"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes that test the script")
    args = parser.parse_args(argv)
    if args.tiny:
        args.tokens, args.rounds = 16, 2
    return args


class Measured:
    """Measures contenders, and writes each row of the results at once."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        """Start with an empty list of rows."""
        self.device, self.rounds = device, args.rounds
        self.shape = TINY.name if args.tiny else args.shape
        self.model = TINY if args.tiny else shapes.MODELS[args.shape]
        self.path = args.out / FILE
        self.where = environment.gpu_environment(device)
        self.rows: list[dict[str, Any]] = []
        self.contenders: dict[str, Contender] = {}
        self.wrong: dict[str, str] = {}

    def choose(self, keys: Sequence[str]) -> bool:
        """Choose and check the contenders.

        Return False if several were requested, but only ``torch`` can run.
        """
        reasons = {key: CONTENDERS[key].skip_reason(self.device) for key in keys}
        able = {key: CONTENDERS[key] for key, reason in reasons.items() if reason is None}
        failed = {key: reason for key, reason in reasons.items() if reason is not None}
        enough = [*able] != ["torch"] or not failed
        if enough:
            self.contenders, wrong = gather(able, self.device, needed=())
            self.wrong = {key: reason for key, reason in wrong.items() if key in OURS}
            self.contenders |= {key: OURS[key] for key in self.wrong}
            failed |= {key: wrong[key] for key in wrong.keys() - OURS.keys()}
        for key, reason in failed.items():
            print(f"{CONTENDERS[key].label()}: {reason}", flush=True)
            self.add(key, note=reason)
        return enough

    def add(
        self, key: str, job: shapes.Job | None = None, *parts: Mapping[str, Any], **more: Any
    ) -> None:
        """Add a row to the results and to ``speed.csv``."""
        label = CONTENDERS[key].label() if key in CONTENDERS else key
        names = {"shape": self.shape, "part": "step", "contender": key, "label": label, "rounds": 0}
        sizes = {} if job is None else job.columns()
        row = tables.row(COLUMNS, names, {"note": self.wrong.get(key, "")}, sizes, *parts, more)
        self.rows.append(row)
        tables.append_csv(self.path, row | self.where)

    def job(self, job: shapes.Job, inputs: shapes.Inputs, parts: bool) -> None:
        """Measure all contenders on one job."""
        calls: dict[str, Callable[[], Any]] = {FLOOR: partial(products.products, inputs)}
        for key, contender in self.contenders.items():
            calls[key] = partial(step, contender.load(), inputs)
        used = {}
        for key, function in calls.items():
            found = measured_memory(function, inputs, self.device)
            if isinstance(found, str):
                self.add(key, job, note=found)
            else:
                used[key] = found.columns()
        calls = {key: calls[key] for key in used}
        if not calls:
            return
        timings = timing.time_interleaved(calls, self.rounds, self.device, progress=False)
        inputs.clear()
        sizes = job.tokens, job.vocab, job.student_width, job.teacher_width
        plans = plan(*sizes, pairs=job.pairs, dtype=job.dtype, device=self.device.type)
        for key, times in timings.items():
            expected = {}
            if key in OURS:
                expected["predicted_ms"] = f"{prediction.total_ms(plans[key]):.3f}"
            self.add(key, job, times.columns(3, timings.get(FLOOR)), used[key], expected)
        if parts and "torch" in calls:
            parts_ms = prediction.part_ms(plans["torch"])
            for part in (self.kernels, self.gemms):
                try:
                    part(job, inputs, calls["torch"], parts_ms)
                except Exception as error:  # after a failure here, earlier times are kept
                    self.add(part.__name__, job, note=first_line(error))

    def kernels(
        self,
        job: shapes.Job,
        inputs: shapes.Inputs,
        function: Callable[[], Any],
        expected: Mapping[str, float],
    ) -> None:
        """Profile a step: print its kernels, and add a row with the time of each part."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities) as profiler:
            timing.seconds(function, self.device)
        inputs.clear()
        events, time = profiler.key_averages(), f"self_{'device' if on_gpu else 'cpu'}_time_total"
        print(events.table(sort_by=time, row_limit=25, max_name_column_width=60), flush=True)
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        ms = dict.fromkeys(PART_NAMES, 0.0)
        for event in events:
            if event.device_type == kind:
                ms[part_of(event.key)] += getattr(event, time) / 1e3
        if not sum(ms.values()):
            raise RuntimeError("the profiler recorded no kernel")
        for part, spent in ms.items():
            known = {"median_ms": f"{spent:.3f}", "predicted_ms": f"{expected[part]:.3f}"}
            self.add(part, job, known, part="kernels of torch", rounds=1)

    def gemms(self, job: shapes.Job, inputs: shapes.Inputs, *_: Any) -> None:
        """Time each GEMM of the ``torch`` backend, with as many rows as a tile, and add a row."""
        for name, rows, flops, function in products.at_layout(inputs):
            calls = {name: lambda run=function: [run() for _ in range(REPEATS)]}
            times = timing.time_interleaved(calls, self.rounds, self.device, False)[name]
            ms = times.median_ms / REPEATS
            known = {"median_ms": f"{ms:.3f}", "tflop_per_s": f"{flops / ms / 1e9:.3g}"}
            self.add(name, job, known, part="one GEMM", tokens=rows, rounds=self.rounds)


def part_of(kernel: str) -> str:
    """Return the part of a step that runs the kernel with this name."""
    return next(part for part, names in PART_NAMES.items() if names.search(kernel))


def measured_memory(
    function: Callable[[], Any], inputs: shapes.Inputs, device: torch.device
) -> memory.Memory | str:
    """Return the memory of a function's second run, or a message if the function fails."""
    try:
        function()  # the first run also compiles and fills caches
        inputs.clear()
        return memory.measure(function, device)
    except Exception as error:
        return first_line(error)
    finally:
        inputs.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
