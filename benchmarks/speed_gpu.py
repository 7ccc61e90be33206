"""Time and peak memory on a GPU, at the sizes of real models, beside the floor and the peers.

    make bench-gpu
    python benchmarks/speed_gpu.py --shapes gpt2 --contenders triton torch    a part of it

Loss and backward, and the loss alone. Times are those of CUDA events, the median of interleaved
rounds with the quickest and the slowest. The peak counts everything above the inputs, gradients
included. The floor is the matrix products alone, by ``torch.mm`` of plain operands: four, and two
for the loss alone. float32 products are exact, not TF32.

What does not fit, or fails, stands in the CSV with the reason. The CSV grows with every job, so
that a run that was stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an install

from benchmarks import harness, memory, providers, shapes, speed_vs_floor  # noqa: E402

SHAPES = {key: shapes.MODELS[key] for key in ("gpt2", "tinyllama", "qwen2.5", "llama3")}
TINY = {"tiny": shapes.Model("tiny", 24, 40, 300)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = ("forward+backward", "forward")
FLOOR = "floor"


def backend(name: str) -> providers.Contender:
    """Return one of the library's own backends as a contender."""
    ours = providers.CONTENDERS["lens_kernels"]
    title = f"{ours.title}, backend {name!r}"
    load = functools.partial(functools.partial, providers.ours, backend=name)
    return dataclasses.replace(ours, key=name, title=title, load=load)


CONTENDERS = {"triton": backend("triton"), "torch": backend("torch")}
CONTENDERS |= {k: c for k, c in providers.CONTENDERS.items() if k != "lens_kernels"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and (reason := harness.no_gpu()):
        raise SystemExit(f"speed_gpu.py: {reason}")
    start = time.perf_counter()
    contenders, missing = gather(args.contenders, device)
    environment = harness.gpu_environment(device)
    path = args.out / harness.file_name("speed", device)
    rows = [row("", "", None, key, note=reason) for key, reason in missing.items()]
    for shape, model in (TINY if args.tiny else SHAPES).items():
        if shape not in args.shapes:
            continue
        vocab, widths = model.vocab, (model.student, model.teacher)
        for tokens in args.tokens:
            for dtype in args.dtypes:
                job = providers.Job(tokens, vocab, 1, *widths, DTYPES[dtype], device)
                print(f"{shape}: {tokens} tokens, {vocab} entries, {widths}, {dtype}", flush=True)
                rows += job_rows(shape, job, contenders, args.rounds)
                harness.write_csv(path, [each | environment for each in rows])
    print(f"\n{path}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, ``--tiny`` applied."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    out = harness.ROOT / "benchmarks" / "data" / "gpu"
    parser.add_argument("--out", type=Path, default=out, metavar="DIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="one tiny job, to try the script")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shapes, args.tokens, args.rounds = [*TINY], [16], 2
    return args


def gather(
    keys: Sequence[str], device: torch.device
) -> tuple[dict[str, providers.Contender], dict[str, str]]:
    """Return the contenders that run here, and the reasons of the others; no peer ends the run."""
    wanted = {key: CONTENDERS[key] for key in keys}
    return providers.gather(wanted, device, [key for key, c in wanted.items() if not c.package])


def job_rows(
    shape: str,
    job: providers.Job,
    contenders: Mapping[str, providers.Contender],
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure a job in both modes and return the lines of the CSV."""
    try:
        inputs = job.make()
    except torch.OutOfMemoryError as error:
        note = f"inputs: {providers.first_line(error)}"
        return [row(shape, mode, job, key, note=note) for mode in MODES for key in contenders]
    rows = []
    for mode in MODES:
        backward = mode == MODES[0]
        timed, peaks, failed = {}, {}, {}
        for key, function in functions(inputs, contenders, backward).items():
            result = measured_memory(function, inputs, job.device)
            if isinstance(result, memory.Memory):
                timed[key], peaks[key] = function, result
            elif key == FLOOR or contenders[key].package or "OutOfMemory" in result:
                failed[key] = result
            else:
                raise RuntimeError(f"{contenders[key].label()}: {result}")
        timings = {}
        if timed:
            timings = harness.time_interleaved(timed, rounds, job.device, progress=False)
        inputs.clear()
        floor = timings.get(FLOOR)
        rows += [row(shape, mode, job, k, t, peaks[k], floor) for k, t in timings.items()]
        rows += [row(shape, mode, job, key, note=note) for key, note in failed.items()]
        show(mode, rows)
    return rows


def functions(
    inputs: providers.Inputs, contenders: Mapping[str, providers.Contender], backward: bool
) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by key, on shared inputs."""

    def call(loss: Callable[[providers.Inputs], torch.Tensor]) -> Callable[[], Any]:
        def step() -> Any:
            inputs.clear()
            return providers.step(loss, inputs)

        @torch.no_grad()
        def forward() -> Any:
            return loss(inputs)

        return step if backward else forward

    ours: dict[str, Callable[[], Any]]
    ours = {FLOOR: functools.partial(speed_vs_floor.products, inputs, backward)}
    return ours | {key: call(contender.load()) for key, contender in contenders.items()}


def measured_memory(
    function: Callable[[], Any], inputs: providers.Inputs, device: torch.device
) -> memory.Memory | str:
    """Return the memory of a function's second run, or why it does not run."""
    try:
        function()  # what is compiled and cached the first time is not its own
        inputs.clear()
        return memory.measure(function, device)
    except Exception as error:
        return providers.first_line(error)
    finally:
        inputs.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def row(
    shape: str,
    mode: str,
    job: providers.Job | None,
    key: str,
    timing: harness.Timing | None = None,
    used: memory.Memory | None = None,
    floor: harness.Timing | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Return one line of the CSV."""
    times = timing.times_ms if timing else ()
    ratio = f"{timing.median_ms / floor.median_ms:.2f}" if timing and floor else ""
    return {
        "shape": shape,
        "mode": mode,
        "contender": key,
        "label": "matrix products alone" if key == FLOOR else CONTENDERS[key].label(),
        "tokens": job.tokens if job else "",
        "vocab_entries": job.vocab if job else "",
        "student_width": job.student_width if job else "",
        "teacher_width": job.teacher_width if job else "",
        "dtype": str(job.dtype).removeprefix("torch.") if job else "",
        "median_ms": f"{timing.median_ms:.3f}" if timing else "",
        "min_ms": f"{min(times):.3f}" if times else "",
        "max_ms": f"{max(times):.3f}" if times else "",
        "ratio_to_floor": ratio,
        "peak_with_gradients_mib": f"{used.peak / memory.MIB:.2f}" if used else "",
        "gradients_mib": f"{used.kept / memory.MIB:.2f}" if used else "",
        "rounds": len(times),
        "note": note,
    }


def show(mode: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of a mode."""
    columns = ["contender", "median_ms", "min_ms", "max_ms", "ratio_to_floor"]
    columns += ["peak_with_gradients_mib"]
    print(f"\n{mode}")
    shown = [each for each in rows if each["mode"] == mode]
    harness.print_table(columns, [[each[column] or "-" for column in columns] for each in shown])
    for each in shown:
        if each["note"]:
            print(f"{each['contender']}: {each['note']}")
    print(flush=True)


if __name__ == "__main__":
    main()
