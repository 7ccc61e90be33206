"""Peak memory of loss and backward against vocabulary size, beside the peers.

    python benchmarks/memory_vs_vocab.py            under 3 minutes on two cores
    python benchmarks/memory_vs_vocab.py --quick    half a minute, small sizes

Every contender is first checked against the fp64 oracle. A point is then really run and measured
if its matrix products fit in ``--gemm-seconds`` and its memory in the machine. Otherwise the number
comes from the same code over fake tensors and is marked ``fake``; where both exist they must agree.

The peak counts everything above the inputs, temporaries and the gradients that were asked for,
because both must fit at once. ``gradients_mib``, what is still live afterwards, is the same for
everyone: no contender can do with less.

The default of 512 tokens, one sequence, is kind to the peers: Liger cuts tokens into chunks of 1024
and TRL of 4096, so beyond that they take more, where ``lens_kernels`` keeps to its workspace.
``--gemm-seconds 0 --tokens 4096`` shows it over fake tensors within a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an install

from benchmarks import harness, memory, plot, providers  # noqa: E402

AGREEMENT = 0.05  # of the measured peak, by which a fake one may be off
SHARE_OF_MEMORY = 0.5  # of what is available, that one run may take with its inputs
# Compiled code takes no fake tensors: its points are measured or missing, and get more time.
PATIENCE_WITHOUT_FAKES = 3
DEFAULT = [key for key in providers.CONTENDERS if key != "dense_kl_div"]  # like dense, but more


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    device = torch.device(args.device)
    start = time.perf_counter()
    contenders, missing = gather(args.contenders, device)
    for contender, reason in missing.items():
        print(f"  {contender.label()}: {reason}")
    rate = harness.matmul_rate(device)
    print(f"matrix products run at {rate / 1e9:.0f} GFLOP/s; {args.tokens} tokens")
    environment = harness.environment(device)
    rows: list[dict[str, Any]] = []
    for vocab in args.vocab:
        jobs = [
            providers.Job(args.tokens, vocab, pairs, device=device) for pairs in sorted(args.pairs)
        ]
        rows += points(jobs, contenders, rate, args.gemm_seconds)
    for contender, reason in missing.items():
        job = providers.Job(args.tokens, args.vocab[0], min(args.pairs), device=device)
        rows.append(row(contender, job, "absent", None, None, reason))
    rows = [each | environment for each in rows]

    csv_path, png_path = args.out / "memory_vs_vocab.csv", args.out / "memory_vs_vocab.png"
    harness.write_csv(csv_path, rows)
    drawn = plot.memory_vs_vocab(csv_path, png_path)
    print_results(rows)
    elapsed = time.perf_counter() - start
    print(f"\n{csv_path}\n{png_path if drawn else drawn_not()}\n{elapsed:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, ``--quick`` applied."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=harness.OUT, metavar="DIR")
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--tokens", type=int, help="default 512, with --quick 128")
    parser.add_argument("--vocab", type=int, nargs="+", help="default 8k to 256k")
    parser.add_argument("--pairs", type=int, nargs="+", help="default 1 5, with --quick 1 2")
    parser.add_argument(
        "--gemm-seconds",
        type=float,
        default=2.0,
        help="really run points whose matrix products take at most this long (default %(default)s)",
    )
    parser.add_argument("--contenders", nargs="+", choices=providers.CONTENDERS, default=DEFAULT)
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (128 if args.quick else 512)
    args.vocab = args.vocab or ([2048, 8192] if args.quick else [8192 << i for i in range(6)])
    args.pairs = args.pairs or ([1, 2] if args.quick else [1, 5])
    return args


def gather(
    keys: Sequence[str], device: torch.device
) -> tuple[list[providers.Contender], dict[providers.Contender, str]]:
    """Return the contenders that run here, and the others with the reason.

    Raises if one runs but computes something else.
    """
    present, missing = [], {}
    for key in keys:
        contender = providers.CONTENDERS[key]
        reason = contender.objection()
        if reason is not None:
            missing[contender] = reason
            continue
        print(f"checking {contender.label()}", flush=True)
        providers.check(contender, device)
        present.append(contender)
    return present, missing


def points(
    jobs: Sequence[providers.Job],
    contenders: Sequence[providers.Contender],
    rate: float,
    gemm_seconds: float,
) -> list[dict[str, Any]]:
    """Return the rows of all contenders at one vocabulary size, for each job's number of pairs."""
    inputs = None
    rows = []
    for job in jobs:
        fingerprint: tuple[float, float] | None = None
        for contender in contenders:
            fake = fake_memory(contender, job)
            reason = too_large(contender, job, fake, rate, gemm_seconds)
            measured = None
            if reason is None:
                inputs = inputs or jobs[-1].make()
                measured, result = real_memory(contender, inputs.pairs(job.pairs), job.device)
                fingerprint = fingerprint or result
                compare(contender, result, fingerprint)
                if fake is not None and abs(fake.peak / measured.peak - 1) > AGREEMENT:
                    raise RuntimeError(
                        f"{contender.label()} at {job}: {measured.peak} bytes measured,"
                        f" {fake.peak} counted over fake tensors"
                    )
            method = "measured" if measured else "fake" if fake else "not run"
            rows.append(row(contender, job, method, measured or fake, fake, reason or ""))
            print(progress(rows[-1]), flush=True)
    return rows


def fake_memory(contender: providers.Contender, job: providers.Job) -> memory.Memory | None:
    """Return what a run over fake tensors counts, where there can be one."""
    # On a GPU the peers and the compiled pass launch kernels, which take no fake tensors.
    if contender.on_fakes is None or job.device.type != "cpu":
        return None
    loss = contender.load()
    with contender.on_fakes(), memory.fake_tensors():
        inputs = job.make()
        return memory.track(lambda: providers.step(loss, inputs))


def too_large(
    contender: providers.Contender,
    job: providers.Job,
    fake: memory.Memory | None,
    rate: float,
    gemm_seconds: float,
) -> str | None:
    """Say why a point is not run for real, or return None."""
    needed = job.gemm_flops() / rate
    if needed > gemm_seconds * (PATIENCE_WITHOUT_FAKES if fake is None else 1):
        return f"time: {needed:.0f} s of matrix products"
    if job.device.type != "cpu":
        return None
    if fake is None:  # compiled code takes no more than the same code uncompiled
        bound = providers.CONTENDERS.get(f"{contender.key}_uncompiled")
        fake = bound and fake_memory(bound, job)
    inputs = job.vocab * (job.student_width + job.teacher_width) * 4
    total = inputs + (fake.peak if fake else 0)
    if total > SHARE_OF_MEMORY * memory.available():
        return f"memory: {total / memory.MIB:.0f} MiB with its inputs"
    return None


def real_memory(
    contender: providers.Contender, inputs: providers.Inputs, device: torch.device
) -> tuple[memory.Memory, tuple[float, float]]:
    """Run once; return the memory measured, and the loss with the size of the head gradient."""
    loss = contender.load()
    inputs.clear()
    values = []
    measured = memory.measure(lambda: values.append(providers.step(loss, inputs)), device)
    assert inputs.student_head.grad is not None
    result = values[0].item(), inputs.student_head.grad.norm().item()
    inputs.clear()
    return measured, result


def compare(
    contender: providers.Contender, result: tuple[float, float], other: tuple[float, float]
) -> None:
    """Raise if a measured run computed something else than the first one at its size."""
    for name, a, b in zip(("loss", "norm of the head gradient"), result, other, strict=True):
        if not abs(a / b - 1) <= 1e-3:
            raise RuntimeError(f"{contender.label()}: {name} {a:.8g}, others {b:.8g}")


def row(
    contender: providers.Contender,
    job: providers.Job,
    method: str,
    memory_used: memory.Memory | None,
    fake: memory.Memory | None,
    note: str,
) -> dict[str, Any]:
    """Return one line of the CSV."""

    def mib(size: int | None) -> str:
        return "" if size is None else f"{size / memory.MIB:.2f}"

    used = memory_used
    return {
        "contender": contender.key,
        "label": contender.label(),
        "pairs": job.pairs,
        "vocab_entries": job.vocab,
        "tokens": job.tokens,
        "student_width": job.student_width,
        "teacher_width": job.teacher_width,
        "dtype": str(job.dtype).removeprefix("torch."),
        "method": method,
        "peak_with_gradients_mib": mib(used and used.peak),
        "gradients_mib": mib(used and used.kept),
        "fake_peak_with_gradients_mib": mib(fake and fake.peak),
        "note": note,
    }


def progress(line: dict[str, Any]) -> str:
    """Return what is said of a point as soon as it is known."""
    number = f"{line['peak_with_gradients_mib']} MiB" if line["peak_with_gradients_mib"] else ""
    note = f" ({line['note']})" if line["note"] else ""
    where = f"V {line['vocab_entries']:>6} pairs {line['pairs']}"
    return f"  {where}  {line['contender']:<16} {number:>12} {line['method']}{note}"


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """Print peak memory by contender and vocabulary, a table for each number of pairs."""
    shown = [each for each in rows if each["method"] != "absent"]
    for pairs in sorted({each["pairs"] for each in shown}):
        at = [each for each in shown if each["pairs"] == pairs]
        vocabularies = sorted({each["vocab_entries"] for each in at})
        cells = {(each["label"], each["vocab_entries"]): cell(each) for each in at}
        labels = dict.fromkeys(each["label"] for each in at)
        table = [[label, *(cells[label, v] for v in vocabularies)] for label in labels]
        kept = {
            each["vocab_entries"]: each["gradients_mib"] for each in at if each["gradients_mib"]
        }
        gradients = [f"{float(kept[v]):.0f}" if v in kept else "-" for v in vocabularies]
        table.append(["of which the gradients", *gradients])
        print(f"\npeak memory above the inputs in MiB, {pairs} lens pair{'s'[: pairs > 1]}")
        harness.print_table(["vocabulary", *map(str, vocabularies)], table)
    print("\n* counted over fake tensors; - not run")
    for each in rows:
        if each["method"] == "absent":
            print(f"{each['label']}: {each['note']}")


def cell(line: dict[str, Any]) -> str:
    """Return the number of one row as it appears in the table."""
    if not line["peak_with_gradients_mib"]:
        return "-"
    mark = "*" if line["method"] == "fake" else ""
    return f"{float(line['peak_with_gradients_mib']):.0f}{mark}"


def drawn_not() -> str:
    """Say why there is no picture."""
    return "no picture: matplotlib is not installed; pip install matplotlib"


if __name__ == "__main__":
    main()
