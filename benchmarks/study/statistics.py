"""Compares runs that are paired by seed, with intervals and verdicts."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.study.groups import Arm, Group

RESAMPLES = 10_000
# The 97.5 % quantiles of Student's t distribution, for 1, 2, ... degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Results = Mapping[str, Mapping[str, str]]  # Maps the key of each run to its line of the CSV.
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with 95 % intervals if there are two seeds or more."""

    mean: float
    bootstrap: Interval | None
    student_t: Interval | None

    @property
    def verdict(self) -> str:
        """``lower``, ``higher``, ``within the noise`` or ``one seed``, by Student's t interval.

        The bootstrap interval resamples the few differences, so it is too narrow for a verdict.
        """
        if self.student_t is None:
            return "one seed"
        low, high = self.student_t
        return "lower" if high < 0 else "higher" if low > 0 else "within the noise"


def difference(values: Sequence[float]) -> Difference:
    """Return the mean of differences, one for each seed, with intervals."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Difference(mean, None, None)
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=n)) for _ in range(RESAMPLES))
    low, high = (means[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))
    half = T_975.get(n - 1, 2.262) * statistics.stdev(values) / n**0.5
    return Difference(mean, (low, high), (mean - half, mean + half))


@dataclass(frozen=True)
class Compared:
    """An objective's mean over seeds, and its difference from the baseline over shared seeds."""

    arm: Arm
    seeds: tuple[int, ...]
    mean: float
    deviation: float
    percent: Difference | None
    # the share of training after which the objective reaches the final KL of the baseline
    reached: float | None
    # the median CPU time of a step in milliseconds
    cpu_ms: float
    # the CPU time of a step, divided by the time of the baseline's step
    cost: float | None


def shared_seeds(
    group: Group, results: Results, seeds: Sequence[int] | None = None
) -> Sequence[int]:
    """Return the seeds that all objectives of a group have, so that their means are comparable.

    Objectives without any result are left out. If no seed is shared, all seeds are returned.
    """
    seeds = group.seeds if seeds is None else seeds
    found = [of(arm, results, seeds).keys() for arm in group.arms]
    shared = [seed for seed in seeds if all(seed in own for own in found if own)]
    return shared or seeds


def compare(
    group: Group,
    results: Results,
    metric: str = "kl",
    seeds: Sequence[int] | None = None,
    absolute: bool = False,
) -> list[Compared]:
    """Return a comparison with the baseline for each objective that has a result.

    All use the same seeds: ``shared_seeds``. Differences are in percent of the baseline's value,
    or absolute if ``absolute`` is true.
    """
    seeds = shared_seeds(group, results, seeds)
    by_label = {arm.label: arm for arm in group.arms}
    found = []
    for arm in group.arms:
        own = of(arm, results, seeds)
        if not own:
            continue
        values = [float(row[metric]) for row in own.values()]
        base = of(by_label[arm.versus], results, seeds) if arm.versus else {}
        both = [seed for seed in own if seed in base]
        percent, reached, cost = None, None, None
        if both:
            scales = [1.0 if absolute else 0.01 * float(base[s][metric]) for s in both]
            gaps = [float(own[s][metric]) - float(base[s][metric]) for s in both]
            percent = difference([gap / x for gap, x in zip(gaps, scales, strict=True)])
            reached = _share_to_reach([(own[s], base[s]) for s in both])
            cost = statistics.median(_cpu_ms(own[s]) / _cpu_ms(base[s]) for s in both)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        cpu_ms = statistics.median(map(_cpu_ms, own.values()))
        mean = statistics.fmean(values)
        found.append(Compared(arm, tuple(own), mean, deviation, percent, reached, cpu_ms, cost))
    return found


def _cpu_ms(row: Mapping[str, str]) -> float:
    return float(row["cpu_ms_per_step"])


def of(arm: Arm, results: Results, seeds: Sequence[int]) -> dict[int, Mapping[str, str]]:
    """Return the results of an objective by seed."""
    keys = {seed: replace(arm.run, seed=seed).key for seed in seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def curve(row: Mapping[str, str]) -> list[tuple[int, float]]:
    """Return the KL of a run at each evaluated step, by step."""
    return sorted((int(step), value) for step, value in json.loads(row["curve"]).items())


def mean_curve(arm: Arm, results: Results, seeds: Sequence[int]) -> list[tuple[int, float]]:
    """Return the KL at each evaluated step as a mean over seeds."""
    curves = [dict(curve(row)) for row in of(arm, results, seeds).values()]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, statistics.fmean(each[step] for each in curves)) for step in shared]


def by_depth(
    arm: Arm, results: Results, seeds: Sequence[int], metric: str
) -> list[tuple[float, float]]:
    """Return a metric of the lens at each of the student's depths, as a mean over seeds."""
    tables = [json.loads(row["by_depth"]) for row in of(arm, results, seeds).values()]
    columns = zip(*tables, strict=True)
    return [(rows[0]["depth"], statistics.fmean(x[metric] for x in rows)) for rows in columns]


def _share_to_reach(rows: Sequence[tuple[Mapping[str, str], Mapping[str, str]]]) -> float | None:
    """Return the mean share of training after which runs reach the baseline's final KL.

    KL is interpolated linearly between evaluations. The result is None if a run never reaches that
    KL.
    """
    shares = []
    for own, base in rows:
        points, goal = curve(own), curve(base)[-1][1]
        last = points[-1][0]
        crossing = None
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            if y1 <= goal < y0:
                crossing = x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)
                break
        if crossing is None:
            return None
        shares.append(crossing / last)
    return statistics.fmean(shares)
