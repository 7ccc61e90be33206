"""Peak memory of loss and backward against vocabulary size, compared with the peers.

    python benchmarks/memory_vs_vocab.py            under 3 minutes on two cores
    python benchmarks/memory_vs_vocab.py --quick    half a minute, small sizes

Every contender is first compared with the fp64 oracle. A contender then runs at each vocabulary
size, and its peak memory is measured. If it would take too long (``--gemm-seconds``) or too much
memory, the same code runs over fake tensors, which have sizes but no memory. The counted memory is
marked ``fake``. Measured and counted memory must agree if both exist.

The peak counts everything besides the inputs: temporaries and gradients. The gradients are the same
for every contender (``gradients_mib``). Liger's chunks have 1024 tokens and TRL's 4096, so both
need more memory with more tokens than the default of 512. ``lens_kernels`` stays within its
workspace. ``--gemm-seconds 0 --tokens 4096`` shows this over fake tensors within a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, memory, plot, tables, timing
from benchmarks.support.contenders import Contender, gather
from benchmarks.support.providers import CONTENDERS
from benchmarks.support.shapes import Job

# The largest relative difference between counted and measured peak memory.
AGREEMENT = 0.05
# The share of the available memory that a run and its inputs may take.
SHARE_OF_MEMORY = 0.5
# The factor by which the time limit is larger for compiled code, which cannot run over fake
# tensors.
PATIENCE_WITHOUT_FAKES = 3
# ``dense_kl_div`` is left out: it is a variant of ``dense`` that takes more memory.
DEFAULT = [key for key in CONTENDERS if key != "dense_kl_div"]
COLUMNS = (
    "contender label pairs vocab_entries tokens student_width teacher_width dtype method"
    " peak_with_gradients_mib gradients_mib fake_peak_with_gradients_mib note"
)

SHOWN = ("contender", "pairs", "vocab_entries", "peak_with_gradients_mib", "method", "note")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure or count all peaks, then print the table and draw the figure."""
    args = parse(argv)
    device = torch.device(args.device)
    start = time.perf_counter()
    chosen = {key: CONTENDERS[key] for key in args.contenders}
    contenders, missing = gather(chosen, device, needed=chosen)
    rate = timing.matmul_rate(device)
    print(f"GEMMs run at {rate / 1e9:.0f} GFLOP/s; {args.tokens} tokens")
    rows: list[dict[str, Any]] = []
    for vocab in args.vocab:
        jobs = [Job(args.tokens, vocab, pairs, device=device) for pairs in sorted(args.pairs)]
        rows += points(jobs, contenders.values(), rate, args.gemm_seconds)
    job = Job(args.tokens, args.vocab[0], min(args.pairs), device=device)
    for key, reason in missing.items():
        rows.append(row(chosen[key], job, {"method": "absent", "note": reason}))

    csv_path = args.out / "memory_vs_vocab.csv"
    where = environment.environment(device)
    tables.write_csv(csv_path, [each | where for each in rows])
    picture = plot.memory_vs_vocab(csv_path)
    print()
    tables.print_rows(rows, SHOWN)
    print(f"\n{csv_path}\n{picture}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command-line arguments. ``--quick`` changes the default sizes."""
    parser = environment.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--tokens", type=int, help="default 512, with --quick 128")
    parser.add_argument("--vocab", type=int, nargs="+", help="default 8k to 256k")
    parser.add_argument("--pairs", type=int, nargs="+", help="default 1 5, with --quick 1 2")
    parser.add_argument(
        "--gemm-seconds",
        type=float,
        default=2.0,
        help="run and measure a point if its GEMMs take at most this time (default %(default)s)",
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (128 if args.quick else 512)
    args.vocab = args.vocab or ([2048, 8192] if args.quick else [8192 << i for i in range(6)])
    args.pairs = args.pairs or ([1, 2] if args.quick else [1, 5])
    return args


def row(contender: Contender, job: Job, *more: dict[str, str]) -> dict[str, Any]:
    """Return the CSV row of a contender's job. ``more`` has further columns."""
    return tables.row(COLUMNS, contender.columns(), job.columns(), *more)


def points(
    jobs: Sequence[Job], contenders: Iterable[Contender], rate: float, gemm_seconds: float
) -> list[dict[str, Any]]:
    """Return the rows of all contenders at one vocabulary size, for each number of pairs."""
    inputs = None
    rows = []
    for job in jobs:
        expected: tuple[float, ...] = ()
        for contender in contenders:
            fake = used = contender.fake_memory(job)
            reason = too_large(contender, job, fake, rate, gemm_seconds)
            if reason is None:
                inputs = inputs or jobs[-1].make()
                real, seen = contender.observe(inputs.pairs(job.pairs), memory.measure)
                used = real
                inputs.clear()
                expected = expected or seen
                if problem := contender.difference(job, seen, expected):
                    raise RuntimeError(f"{contender.label()} differs from the others: {problem}")
                if fake is not None and abs(fake.peak / real.peak - 1) > AGREEMENT:
                    raise RuntimeError(
                        f"{contender.label()} at {job}: {real.peak} bytes measured,"
                        f" {fake.peak} counted over fake tensors"
                    )
            method = "measured" if reason is None else "fake" if fake else "not run"
            columns = {"method": method, "note": reason or ""} | (used.columns() if used else {})
            if fake:
                columns["fake_peak_with_gradients_mib"] = memory.mib(fake.peak)
            rows.append(row(contender, job, columns))
            print("  " + " ".join(str(rows[-1][name] or "-") for name in SHOWN), flush=True)
    return rows


def too_large(
    contender: Contender, job: Job, fake: memory.Memory | None, rate: float, gemm_seconds: float
) -> str | None:
    """Return the reason why a contender cannot run a job with real tensors, or None if it can."""
    needed = job.gemm_flops() / rate
    if needed > gemm_seconds * (PATIENCE_WITHOUT_FAKES if fake is None else 1):
        return f"time: {needed:.0f} s of GEMMs"
    if job.device.type != "cpu":
        return None
    if fake is None:  # the uncompiled code needs at least as much memory
        bound = CONTENDERS.get(f"{contender.key}_uncompiled")
        fake = None if bound is None else bound.fake_memory(job)
    inputs = job.vocab * (job.student_width + job.teacher_width) * 4
    total = inputs + (fake.peak if fake else 0)
    if total > SHARE_OF_MEMORY * memory.available():
        return f"memory: {total / memory.MIB:.0f} MiB with its inputs"
    return None


if __name__ == "__main__":
    main()
