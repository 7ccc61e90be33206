"""Time and peak memory on a GPU at the sizes of real models, compared with the floor and peers.

    make bench-gpu
    python benchmarks/speed_gpu.py --shapes gpt2 --contenders triton torch    only these

It measures loss with backward, and the loss alone. Times come from CUDA events: the median,
fastest and slowest of interleaved rounds. The peak counts everything above the inputs, gradients
included. The floor is the time of the GEMMs alone, by ``torch.mm`` of plain operands: four GEMMs,
or two for the loss alone. float32 GEMMs do not use TF32.

Jobs that do not fit or fail are in the CSV with the reason. The CSV is written after every job, so
a stopped run keeps its results.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, memory, products, providers, shapes, tables, timing
from benchmarks.support.contenders import Contender, first_line, gather, step

SHAPES = {key: shapes.MODELS[key] for key in ("gpt2", "tinyllama", "qwen2.5", "llama3")}
TINY = {"tiny": shapes.Model("tiny", 24, 40, 300)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = ("forward+backward", "forward")
FLOOR = "floor"
CONTENDERS = {key: providers.backend(key) for key in ("triton", "torch")} | providers.PEERS
COLUMNS = (
    "shape mode contender label tokens vocab_entries student_width teacher_width dtype median_ms"
    " min_ms max_ms ratio_to_floor peak_with_gradients_mib gradients_mib rounds note"
)
SHOWN = "contender median_ms min_ms max_ms ratio_to_floor peak_with_gradients_mib note"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and (reason := environment.no_gpu()):
        raise SystemExit(f"speed_gpu.py: {reason}")
    start = time.perf_counter()
    chosen = {key: CONTENDERS[key] for key in args.contenders}
    ours = [key for key, contender in chosen.items() if not contender.package]
    contenders, missing = gather(chosen, device, needed=ours)
    where = environment.gpu_environment(device)
    path = args.out / environment.file_name("speed", device)
    rows = [row(key, note=reason) for key, reason in missing.items()]
    for shape, model in (TINY if args.tiny else SHAPES).items():
        if shape not in args.shapes:
            continue
        for tokens in args.tokens:
            for dtype in args.dtypes:
                job = model.job(tokens, dtype=DTYPES[dtype], device=device)
                print(f"{shape}: {job}", flush=True)
                rows += job_rows(shape, job, contenders, args.rounds)
                tables.write_csv(path, [each | where for each in rows])
    print(f"\n{path}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, ``--tiny`` applied."""
    parser = environment.parser(__doc__, rounds=10)
    parser.set_defaults(out=environment.DATA / "gpu", device="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--tiny", action="store_true", help="one tiny job that tests the script")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shapes, args.tokens, args.rounds = [*TINY], [16], 2
    return args


def row(key: str, *parts: Mapping[str, Any], **more: str) -> dict[str, Any]:
    """Return one line of the CSV."""
    label = "GEMMs alone" if key == FLOOR else CONTENDERS[key].label()
    names = {"contender": key, "label": label, "rounds": 0, **more}
    return tables.row(COLUMNS, names, *parts)


def job_rows(
    shape: str, job: shapes.Job, contenders: Mapping[str, Contender], rounds: int
) -> list[dict[str, Any]]:
    """Measure a job in both modes and return the lines of the CSV."""
    sizes = {"shape": shape, **job.columns()}
    try:
        inputs = job.make()
    except torch.OutOfMemoryError as error:
        note = f"inputs: {first_line(error)}"
        return [row(key, sizes, mode=mode, note=note) for mode in MODES for key in contenders]
    rows = []
    for mode in MODES:
        timed, used, failed = {}, {}, {}
        for key, function in functions(inputs, contenders, mode == MODES[0]).items():
            result = measured_memory(function, inputs, job.device)
            if isinstance(result, memory.Memory):
                timed[key], used[key] = function, result.columns()
            elif key == FLOOR or contenders[key].package or "OutOfMemory" in result:
                failed[key] = result
            else:
                raise RuntimeError(f"{contenders[key].label()}: {result}")
        timings = {}
        if timed:
            timings = timing.time_interleaved(timed, rounds, job.device, progress=False)
        inputs.clear()
        for key, times in timings.items():
            columns = times.columns(3, timings.get(FLOOR))
            rows.append(row(key, sizes, columns, used[key], mode=mode))
        rows += [row(key, sizes, mode=mode, note=note) for key, note in failed.items()]
        print(f"\n{mode}")
        tables.print_rows([each for each in rows if each["mode"] == mode], SHOWN.split())
        print(flush=True)
    return rows


def functions(
    inputs: shapes.Inputs, contenders: Mapping[str, Contender], backward: bool
) -> dict[str, Callable[[], Any]]:
    """Return the functions to measure, by key, on shared inputs."""
    forward = torch.no_grad()(lambda loss, inputs: loss(inputs))
    call = step if backward else forward
    calls = {key: partial(call, each.load(), inputs) for key, each in contenders.items()}
    return {FLOOR: partial(products.products, inputs, backward), **calls}


def measured_memory(
    function: Callable[[], Any], inputs: shapes.Inputs, device: torch.device
) -> memory.Memory | str:
    """Return the memory of a function's second run, or why it does not run."""
    try:
        function()  # so that compilation and caches are not counted
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
    main()
