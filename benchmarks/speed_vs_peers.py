"""Time of loss and backward beside the peers and the floor: tokens, vocabulary, pairs, mask.

    python benchmarks/speed_vs_peers.py                     under 15 minutes on two quiet cores
    python benchmarks/speed_vs_peers.py --sweep models      sizes of other models, 4 minutes more
    python benchmarks/speed_vs_peers.py --quick             tiny sizes, to try the script

The floor is the four products with the heads alone, of the tokens that count. Every contender is
first checked against the fp64 oracle, with and without masked tokens, and at each point its loss
and the norms of its gradients are compared with those of the first one. Where they differ, dense
PyTorch decides: a peer that is wrong is not timed, and if the first one is wrong the run ends. What
compiles runs once before it is timed. Rounds are interleaved: in each, every point, and at a point
every contender, has its turn. Ratios are taken within a round, because the clock of a machine
drifts; medians of them count.

Slow contenders take part in every other round, and are left out of large points; the CSV says so.
It is written after each turn of a point, and the same command goes on where it was stopped, if
code, versions and machine are still the same. Name the same contenders then, or more: if one is
new at a point, all that are named are timed there again. The sweep ``memory`` runs ours and TRL
once, and counts the bytes of the others over fake tensors: they take too long or do not fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an install

from benchmarks import (  # noqa: E402
    harness,
    memory,
    memory_vs_vocab,
    plot,
    providers,
    shapes,
    speed_bars,
    speed_gpu,
    speed_vs_floor,
)
from benchmarks.speed_points import FLOOR, SLOW, SWEEPS, Point, points, takes_part  # noqa: E402
from benchmarks.speed_results import Results  # noqa: E402

CONTENDERS = {
    "lens_kernels": providers.CONTENDERS["lens_kernels"],
    "triton": replace(speed_gpu.backend("triton"), gpu_only=True),
    **{key: c for key, c in providers.CONTENDERS.items() if key != "lens_kernels"},
    **providers.SPEED_CONTENDERS,
}
RUN_AT_THE_LARGE_POINT = ("lens_kernels", "trl")
README = harness.ROOT / "benchmarks" / "README.md"
AVAILABLE = 0.9  # of main memory, that a contender may take


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    results = Results(args.out / "speed_vs_peers.csv", harness.environment(device))
    contenders, missing = gather(args.contenders, device)
    for key, reason in missing.items():
        results.put(None, key, CONTENDERS[key].label(), note=reason)
    plan = [p for p in points(args.tokens, device, args.quick) if {*p.sweeps} & {*args.sweep}]
    timed = [point for point in plan if point.sweeps != ("memory",)]
    runners = [Runner(point, contenders, results, args.rounds) for point in timed]
    results.save()
    for number in range(args.rounds + 1):
        for runner in runners:
            runner.turn(number)
    for point in plan:
        if point.sweeps == ("memory",):
            large_point(point, contenders, results)
    png = results.path.with_suffix(".png")
    drawn = plot.speed_vs_peers(results.path, png)
    print()
    rows = results.rows()
    for header, lines in (
        (speed_bars.BASE_TIMES, speed_bars.base_times(rows)),
        (speed_bars.VERDICT, speed_bars.verdict(rows)),
    ):
        harness.print_table(header, lines)
        print()
    if args.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(speed_bars.with_tables(text, rows), encoding="utf-8")
    picture = png if drawn else memory_vs_vocab.drawn_not()
    print(f"{results.path}\n{picture}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, ``--quick`` applied."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=harness.OUT, metavar="DIR")
    parser.add_argument("--device", default=default_device)
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=SWEEPS[:-1], help="default: all but models"
    )
    parser.add_argument("--tokens", type=int, help="default 1024, with --quick 64")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument(
        "--readme", action="store_true", help="also write the tables into benchmarks/README.md"
    )
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (64 if args.quick else 1024)
    return args


def gather(
    keys: Sequence[str], device: torch.device
) -> tuple[dict[str, providers.Contender], dict[str, str]]:
    """Return the contenders that run here, and the reasons of the others; ours ends the run."""
    return providers.gather({key: CONTENDERS[key] for key in keys}, device, ["lens_kernels"])


class Runner:
    """The contenders at one point, round after round."""

    def __init__(
        self,
        point: Point,
        contenders: Mapping[str, providers.Contender],
        results: Results,
        rounds: int,
    ) -> None:
        """Say who is left out, and who has been timed already."""
        self.point, self.results, self.rounds = point, results, rounds
        self.contenders = dict(contenders)
        self.first, self.expected = "", (0.0,)
        for key, contender in contenders.items():
            if results.times(point, key):
                continue
            left_out = "left out here, to save time" if key in point.left_out else None
            reason = results.reason(point, key) or left_out or too_large(contender, point.job)
            if reason:
                self._leave_out(key, reason)
        done = {key: len(results.times(point, key)) for key in (FLOOR, *self.contenders)}
        if any(done.values()):
            print(f"{point.key()}: rounds that are there already: {done}", flush=True)

    def turn(self, number: int) -> None:
        """Run a round, and write what came of it once all had their turn.

        If one lacks the round, all take it again: they are compared with one another.
        """
        if not self._is_due(number):
            return
        inputs = self.point.job.make()
        label = f"round {number} of {self.rounds}" if number else "not timed"
        taken: dict[str, float] = {}
        for key in harness.rotated(self._keys(number), number):
            try:
                taken[key] = self._seconds(key, inputs)
            except Exception as error:
                if key in (FLOOR, "lens_kernels"):
                    raise
                self._leave_out(key, providers.first_line(error))
                continue
            print(f"{label}: {self.point.key()}: {key} {taken[key]:.2f} s", flush=True)
        for key, elapsed in taken.items() if number else ():
            times = self.results.times(self.point, key) | {number: elapsed * 1e3}
            floor = "the four products alone"
            title = floor if key == FLOOR else self.contenders[key].label()
            note = "slow: every other round" if key in SLOW else ""
            self.results.put(self.point, key, title, times=times, note=note)
        self.results.save()

    def _leave_out(self, key: str, reason: str) -> None:
        title = self.contenders.pop(key).label()
        print(f"{self.point.key()}: {key}: {reason}", flush=True)
        if self.results.reason(self.point, key) != reason:  # else it keeps the date it was found at
            self.results.put(self.point, key, title, note=reason)

    def _keys(self, number: int) -> list[str]:
        return [key for key in (FLOOR, *self.contenders) if takes_part(key, number)]

    def _is_due(self, number: int) -> bool:
        if number == 0:
            rounds = range(1, self.rounds + 1)
            return bool(self._keys(0)) and any(self._is_due(later) for later in rounds)
        return any(number not in self.results.times(self.point, k) for k in self._keys(number))

    def _seconds(self, key: str, inputs: shapes.Inputs) -> float:
        """Return the time of one call, whose results must be those of the others."""
        if key == FLOOR:
            cut = counted(inputs)
            return harness.seconds(lambda: speed_vs_floor.products(cut), self.point.job.device)
        contender = self.contenders[key]
        values: list[torch.Tensor] = []
        call = step(contender.load(), inputs, values)
        elapsed = harness.seconds(call, self.point.job.device)
        seen = fingerprint(values[0], inputs)
        if not self.first:
            self.first, self.expected = key, seen
        if difference(contender, self.point.job, seen, self.expected):
            inputs.clear()
            truth = fingerprint(providers.step(providers.dense, inputs), inputs)
            if problem := difference(contender, self.point.job, seen, truth):
                raise RuntimeError(f"{contender.label()} computes something else: {problem}")
            raise SystemExit(
                f"{self.point.key()}: {contender.label()} and dense PyTorch agree, and differ from"
                f" {self.first}, which was first"
            )
        return elapsed


def step(
    loss: Callable[[shapes.Inputs], torch.Tensor],
    inputs: shapes.Inputs,
    values: list[torch.Tensor],
) -> Callable[[], None]:
    """Return a call that makes loss and gradients, and keeps the loss."""
    inputs.clear()
    return lambda: values.append(providers.step(loss, inputs))


def counted(inputs: shapes.Inputs) -> shapes.Inputs:
    """Return the inputs without masked rows: the floor does not even pick them."""
    student = [inputs.counted(x).detach() for x in inputs.student_hidden]
    teacher = [inputs.counted(x) for x in inputs.teacher_hidden]
    return replace(inputs, student_hidden=student, teacher_hidden=teacher, mask=None)


def too_large(contender: providers.Contender, job: shapes.Job) -> str | None:
    """Say that a contender does not fit into main memory, as far as fakes tell; or return None."""
    # Fakes cannot drop the masked rows, so that this is an upper bound for those who do.
    try:
        fake = memory_vs_vocab.fake_memory(contender, replace(job, masked=0.0))
    except Exception:  # what fails shall say so in its turn
        return None
    if fake is None or fake.peak <= AVAILABLE * memory.available():
        return None
    return f"does not fit: {fake.peak / memory.MIB:.0f} MiB"


def fingerprint(value: torch.Tensor, inputs: shapes.Inputs) -> tuple[float, ...]:
    """Return the loss and the norms of all gradients."""
    norms = (x.grad.norm().item() if x.grad is not None else 0.0 for x in inputs.leaves())
    return value.item(), *norms


def difference(
    contender: providers.Contender,
    job: shapes.Job,
    seen: tuple[float, ...],
    expected: tuple[float, ...],
) -> str | None:
    """Say what a contender computed that is not what was expected, or return None."""
    names = ["loss"] + [f"norm of gradient {i}" for i in range(job.pairs + 1)]
    for name, got, other in zip(names, seen, expected, strict=True):
        allowed = 1e-3 * other
        if name == "loss":
            allowed = 1e-4 * other + contender.epsilon * job.vocab
        if not abs(got - other) <= allowed:
            return f"{name} {got:.6g}, expected {other:.6g}"
    return None


def large_point(
    point: Point, contenders: Mapping[str, providers.Contender], results: Results
) -> None:
    """Measure temporary memory: of everyone counted, but ours and TRL are run, and timed, once."""
    expected: tuple[float, ...] | None = None
    for key, contender in contenders.items():
        if results.has(point, key):
            print(f"{point.key()}: {key} is there already", flush=True)
            continue
        if key in point.left_out:
            continue
        if key in RUN_AT_THE_LARGE_POINT:
            used, elapsed, seen = run_once(contender, point.job)
            expected = expected or seen
            if problem := difference(contender, point.job, seen, expected):
                raise RuntimeError(f"{contender.label()} differs from the others: {problem}")
            times, method, note = {1: elapsed * 1e3}, "measured", "once"
        else:
            counted_only = memory_vs_vocab.fake_memory(contender, point.job)
            if counted_only is None:
                results.put(point, key, contender.label(), note="not run, and fakes cannot tell")
                continue
            used, times, method, note = counted_only, {}, "fake", "not run: takes too long"
        row = results.put(
            point,
            key,
            contender.label(),
            times=times,
            temporaries=used.peak - used.kept,
            method=method,
            note=note,
        )
        results.save()
        spent = f"{times[1] / 1e3:.2f} s" if times else note
        print(f"{point.key()}: {key} {row['temporaries_mib']} MiB, {spent}", flush=True)


def run_once(
    contender: providers.Contender, job: shapes.Job
) -> tuple[memory.Memory, float, tuple[float, ...]]:
    """Return memory, seconds and fingerprint of one run; what is compiled was so before."""
    loss = contender.load()
    providers.step(loss, replace(job, tokens=job.tokens // 4, pairs=1).make())
    inputs = job.make()
    values: list[torch.Tensor] = []
    elapsed: list[float] = []
    call = step(loss, inputs, values)
    used = memory.measure(lambda: elapsed.append(harness.seconds(call, job.device)), job.device)
    return used, elapsed[0], fingerprint(values[0], inputs)


if __name__ == "__main__":
    main()
