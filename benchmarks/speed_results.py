"""The CSV of ``speed_vs_peers.py``: a row for each contender at each point, kept over runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks import harness, memory, speed_bars
from benchmarks.speed_points import FLOOR, Point


class Results:
    """The rows, by point and contender."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        """Read what a run that was stopped has left.

        Raises:
            RuntimeError: It was measured with other code, versions, or on another machine.
        """
        self.path = path
        self.environment = environment
        self._rows: dict[tuple[str, str], dict[str, str]] = {}
        for row in harness.read_own_csv(path, environment):
            # Who is missing altogether, and what fits into memory, is found anew.
            if row["point"] and not row["note"].startswith("does not fit"):
                self._rows[row["point"], row["contender"]] = row

    def rows(self) -> list[dict[str, str]]:
        """Return all rows."""
        return [*self._rows.values()]

    def has(self, point: Point, key: str) -> bool:
        """Say whether there is a row."""
        return (point.key(), key) in self._rows

    def reason(self, point: Point, key: str) -> str:
        """Return the note of a row, or nothing if there is no row."""
        return self._rows.get((point.key(), key), {}).get("note", "")

    def times(self, point: Point, key: str) -> dict[int, float]:
        """Return the times that there are, in ms by round."""
        return speed_bars.times(self._rows.get((point.key(), key), {}))

    def put(
        self,
        point: Point | None,
        key: str,
        label: str,
        *,
        times: Mapping[int, float] | None = None,
        temporaries: int | None = None,
        method: str = "",
        note: str = "",
    ) -> dict[str, str]:
        """Set a row and return it."""
        job = point.job if point else None
        timing = harness.Timing(tuple((times or {}).values()))
        row = {
            "point": point.key() if point else "",
            "sweeps": " ".join(point.sweeps) if point else "",
            "model": point.model if point else "",
            "contender": key,
            "label": label,
            "tokens": str(job.tokens) if job else "",
            "vocab_entries": str(job.vocab) if job else "",
            "pairs": str(job.pairs) if job else "",
            "masked": f"{job.masked:g}" if job else "",
            "student_width": str(job.student_width) if job else "",
            "teacher_width": str(job.teacher_width) if job else "",
            "dtype": str(job.dtype).removeprefix("torch.") if job else "",
            "median_ms": f"{timing.median_ms:.2f}" if times else "",
            "min_ms": f"{min(timing.times_ms):.2f}" if times else "",
            "max_ms": f"{max(timing.times_ms):.2f}" if times else "",
            "ratio_to_floor": "",
            "rounds": str(len(times or {})),
            "times_ms": " ".join(f"{number}:{ms:.2f}" for number, ms in (times or {}).items()),
            "temporaries_mib": "" if temporaries is None else f"{temporaries / memory.MIB:.2f}",
            "memory_method": method,
            "note": note,
            **self.environment,
        }
        self._rows[row["point"], key] = row
        return row

    def save(self) -> None:
        """Relate the times to the floor's, round by round, and write the file."""
        for (place, _), row in self._rows.items():
            ratios = speed_bars.ratios(row, self._rows.get((place, FLOOR), {}))
            if ratios:
                row["ratio_to_floor"] = f"{harness.Timing(tuple(ratios)).median_ms:.2f}"
        if self._rows:
            harness.write_csv(self.path, self.rows())
