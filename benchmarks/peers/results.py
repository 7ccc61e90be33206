"""The CSV of ``speed_vs_peers.py``: a row for each contender at each point, kept between runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.points import FLOOR, Point
from benchmarks.support import tables
from benchmarks.support.timing import Timing

COLUMNS = (
    "point sweeps model contender label tokens vocab_entries pairs masked student_width"
    " teacher_width dtype median_ms min_ms max_ms ratio_to_floor rounds times_ms temporaries_mib"
    " memory_method note"
)


class Results:
    """The CSV rows, by point (a set of sizes) and contender."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        """Read the rows that an earlier run wrote, if there are any.

        Raises:
            RuntimeError: The rows were measured with other code, versions, or another machine.
        """
        self.path = path
        self.environment = environment
        self._rows: dict[tuple[str, str], dict[str, str]] = {}
        for row in tables.read_own_csv(path, environment):
            # Drop rows about a missing package or too little memory, because each run checks both
            # again.
            if row["point"] and not row["note"].startswith("does not fit"):
                self._rows[row["point"], row["contender"]] = row

    def rows(self) -> list[dict[str, str]]:
        """Return all rows."""
        return [*self._rows.values()]

    def row(self, point: Point, key: str) -> dict[str, str]:
        """Return a contender's row at a point, or an empty dict if there is none."""
        return self._rows.get((point.key(), key), {})

    def times(self, point: Point, key: str) -> Mapping[int, float]:
        """Return the times of a contender at a point, in ms by round."""
        return Timing.read(self.row(point, key).get("times_ms", "")).by_round

    def put(
        self,
        point: Point | None,
        key: str,
        label: str,
        times: Mapping[int, float] | None = None,
        **more: str,
    ) -> dict[str, str]:
        """Set a contender's row at a point, and return it."""
        timing = Timing(times or {})
        names: dict[str, Any] = {"contender": key, "label": label, "times_ms": timing}
        parts = [names, timing.columns(), more, *([point.columns()] if point else [])]
        values = tables.row(COLUMNS, *parts) | dict(self.environment)
        row = {name: str(value) for name, value in values.items()}
        self._rows[row["point"], key] = row
        return row

    def save(self) -> None:
        """Divide each time by the GEMMs' time in the same round, and write the CSV."""
        for (place, _), row in self._rows.items():
            if floor := self._rows.get((place, FLOOR)):
                ratios = Timing.read(row["times_ms"]).ratios(Timing.read(floor["times_ms"]))
                row["ratio_to_floor"] = f"{statistics.median(ratios):.2f}" if ratios else ""
        if self._rows:
            tables.write_csv(self.path, self.rows())
