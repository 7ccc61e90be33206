"""Runs the rounds of ``speed_vs_peers.py``. In a round, every contender runs at every point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.peers.points import FLOOR, SLOW, Point, takes_part
from benchmarks.peers.results import Results
from benchmarks.support import memory, products, providers, shapes, timing
from benchmarks.support.contenders import Contender, first_line, step

RUN_AT_THE_LARGE_POINT = ("lens_kernels", "trl")
AVAILABLE = 0.9  # the share of the available memory that a contender may use


class Runner:
    """Times the contenders at one point (a set of sizes), one round after another."""

    def __init__(
        self, point: Point, contenders: Mapping[str, Contender], results: Results, rounds: int
    ) -> None:
        """Choose contenders. Print those that are left out, and rounds that are measured."""
        self.point, self.results, self.rounds = point, results, rounds
        self.contenders = dict(contenders)
        self.first = ""
        self.expected: tuple[float, ...] = ()
        for key, contender in contenders.items():
            if results.times(point, key):
                continue
            left_out = "left out at this point to save time" if key in point.left_out else None
            reason = (
                results.row(point, key).get("note") or left_out or too_large(contender, point.job)
            )
            if reason:
                self._leave_out(key, reason)
        done = {key: len(results.times(point, key)) for key in (FLOOR, *self.contenders)}
        if any(done.values()):
            print(f"{point.key()}: rounds measured already: {done}", flush=True)

    def turn(self, number: int) -> None:
        """Run one round at this point, and write its times when all contenders have run.

        If a contender has no time in this round, all contenders run the round again, because ratios
        need times of the same round.
        """
        if not self._is_due(number):
            return
        inputs = self.point.job.make()
        label = f"round {number} of {self.rounds}" if number else "not timed"
        taken: dict[str, float] = {}
        for key in timing.rotated(self._keys(number), number):
            try:
                taken[key] = self._seconds(key, inputs)
            except Exception as error:
                if key in (FLOOR, "lens_kernels"):
                    raise
                self._leave_out(key, first_line(error))
                continue
            print(f"{label}: {self.point.key()}: {key} {taken[key]:.2f} s", flush=True)
        for key, elapsed in taken.items() if number else ():
            times = {**self.results.times(self.point, key), number: elapsed * 1e3}
            title = products.TITLE if key == FLOOR else self.contenders[key].label()
            note = "slow: every other round" if key in SLOW else ""
            self.results.put(self.point, key, title, times, note=note)
        self.results.save()

    def _leave_out(self, key: str, reason: str) -> None:
        title = self.contenders.pop(key).label()
        print(f"{self.point.key()}: {key}: {reason}", flush=True)
        if (
            self.results.row(self.point, key).get("note") != reason
        ):  # an unchanged note keeps its row with its date
            self.results.put(self.point, key, title, note=reason)

    def _keys(self, number: int) -> list[str]:
        return [key for key in (FLOOR, *self.contenders) if takes_part(key, number)]

    def _is_due(self, number: int) -> bool:
        if number == 0:
            rounds = range(1, self.rounds + 1)
            return bool(self._keys(0)) and any(self._is_due(later) for later in rounds)
        return any(number not in self.results.times(self.point, k) for k in self._keys(number))

    def _seconds(self, key: str, inputs: shapes.Inputs) -> float:
        job = self.point.job
        if key == FLOOR:
            cut = counted(inputs)
            return timing.seconds(lambda: products.products(cut), job.device)
        contender = self.contenders[key]
        elapsed, seen = contender.observe(inputs, timing.seconds)
        if not self.first:
            self.first, self.expected = key, seen
        if contender.difference(job, seen, self.expected):
            _, truth = providers.CONTENDERS["dense"].observe(inputs, lambda call, device: call())
            if problem := contender.difference(job, seen, truth):
                raise RuntimeError(f"{contender.label()} gives a wrong result: {problem}")
            raise SystemExit(
                f"{self.point.key()}: {contender.label()} and dense PyTorch agree, but"
                f" {self.first}, which ran first, gives another result"
            )
        return elapsed


def counted(inputs: shapes.Inputs) -> shapes.Inputs:
    """Return the inputs without masked rows, to time the GEMMs of unmasked tokens."""
    student = [inputs.counted(x).detach() for x in inputs.student_hidden]
    teacher = [inputs.counted(x) for x in inputs.teacher_hidden]
    return replace(inputs, student_hidden=student, teacher_hidden=teacher, mask=None)


def too_large(contender: Contender, job: shapes.Job) -> str | None:
    """Return a message if a contender needs more memory than is available, else None."""
    # Fake tensors cannot drop masked rows. So the memory is counted without a mask, as an upper
    # bound.
    try:
        fake = contender.fake_memory(replace(job, masked=0.0))
    except Exception:  # the real run shows the error
        return None
    if fake is None or fake.peak <= AVAILABLE * memory.available():
        return None
    return f"does not fit: {fake.peak / memory.MIB:.0f} MiB"


def large_point(point: Point, contenders: Mapping[str, Contender], results: Results) -> None:
    """Run lens_kernels and TRL once with the largest sizes. Count the memory of others."""
    expected: tuple[float, ...] | None = None
    for key, contender in contenders.items():
        if results.row(point, key):
            print(f"{point.key()}: {key} is measured already", flush=True)
            continue
        if key in point.left_out:
            continue
        times: dict[int, float] = {}
        if key in RUN_AT_THE_LARGE_POINT:
            # Compile on a smaller job, so that the time of the large job excludes compilation.
            step(contender.load(), replace(point.job, tokens=point.job.tokens // 4, pairs=1).make())
            (used, elapsed), seen = contender.observe(point.job.make(), _memory_and_seconds)
            expected = expected or seen
            if problem := contender.difference(point.job, seen, expected):
                raise RuntimeError(f"{contender.label()} differs from the others: {problem}")
            times, method, note = {1: elapsed * 1e3}, "measured", "once"
        elif counts := contender.fake_memory(point.job):
            used, method, note = counts, "fake", "not run: takes too long"
        else:
            results.put(
                point,
                key,
                contender.label(),
                note="not run: cannot be counted over fakes",
            )
            continue
        size = memory.mib(used.peak - used.kept)
        columns = {"temporaries_mib": size, "memory_method": method, "note": note}
        results.put(point, key, contender.label(), times, **columns)
        results.save()
        spent = f"{times[1] / 1e3:.2f} s" if times else note
        print(f"{point.key()}: {key} {size} MiB, {spent}", flush=True)


def _memory_and_seconds(
    call: Callable[[], Any], device: torch.device
) -> tuple[memory.Memory, float]:
    elapsed: list[float] = []
    used = memory.measure(lambda: elapsed.append(timing.seconds(call, device)), device)
    return used, elapsed[0]
