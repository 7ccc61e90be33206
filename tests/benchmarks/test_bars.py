"""The performance limits and the tables on the benchmarks' page are computed from the CSV."""

import pytest

from benchmarks import speed_vs_peers
from benchmarks.peers import bars
from benchmarks.peers.points import FLOOR, SWEEPS, points
from benchmarks.support import environment, tables
from benchmarks.support.environment import CPU
from benchmarks.support.timing import Timing


def test_the_default_run_measures_every_bar():
    plan = {point.key(): point for point in points(1024, CPU)}
    chosen = speed_vs_peers.parse([])
    for bar in bars.BARS:
        for where, key in (bar.top, bar.bottom):
            point = plan[where]
            assert {*point.sweeps} & {*chosen.sweep}
            assert key not in point.left_out and key in (FLOOR, *chosen.contenders)
            assert (point.job.student_width, point.job.teacher_width) == (768, 1600)
    assert {sweep for p in plan.values() for sweep in p.sweeps} == {*SWEEPS}
    assert len(plan) == len(points(1024, CPU))


def made(contender, point, times="", temporaries=""):
    """Return a CSV row of a contender, with the columns that ``verdict`` reads."""
    timing = {"median_ms": "", **Timing.read(times).columns()}
    row = {"contender": contender, "label": contender.upper(), "point": point, "times_ms": times}
    row |= {"temporaries_mib": temporaries, "ratio_to_floor": "1.25"}
    return row | {name: str(value) for name, value in timing.items()}


@pytest.mark.parametrize(("five", "end"), [(5590, "met"), (5610, "missed")])
def test_verdict_compares_ratios_with_the_bars(five, end):
    base = bars.BASE
    rows = [
        made("floor", base, "1:1000 2:2000 3:1000"),
        # Round 2 was slow for all contenders. The ratio of the median times would be 1.2, not 1.05.
        made("lens_kernels", base, "1:1050 2:2040 3:1200"),
        made("dense", base, "1:2100 2:4080 3:2640"),
        made("trl", base, "1:4200 3:3000"),
        made("lens_kernels", bars.HALF, "1:500 2:500 3:500"),
        made("lens_kernels", bars.LARGE, "1:9000", "100"),
        made("dense", bars.LARGE, "", "4990"),
        made("trl", bars.LARGE, "1:8000", "500"),
        made("liger", base.replace("gpt2", "tiny"), "1:9999"),
        # The limit is 5.6: how much longer five pairs may take than one pair.
        made("lens_kernels", "gpt2 N1024 V50257 L1 masked 0.5", "1:1000"),
        made("lens_kernels", bars.FIVE, f"1:{five}"),
    ]
    lines = bars.verdict(rows)
    assert [line[0] for line in lines] == [bar.what for bar in bars.BARS]
    found = {line[0]: ", ".join(line[1:]) for line in lines if line[-1] != "not measured"}
    assert found.pop("lens_kernels, 5 pairs / 1, half masked").endswith(end)
    assert found == {
        "lens_kernels / four GEMMs": "at most 1.10, 1.05, 1.02 to 1.20, met",
        "dense PyTorch, lean / lens_kernels": "at least 2.40, 2.00, 2.00 to 2.20, missed",
        "TRL / lens_kernels": "at least 3.00, 3.25, 2.50 to 4.00, met",
        "lens_kernels, 1024 / 512 tokens": "at most 2.10, 2.40, 2.10 to 4.08, missed",
        "temporary memory, large size: dense PyTorch / lens_kernels": "at least 50.00, 49.90, once,"
        " missed",
        "temporary memory, large size: TRL / lens_kernels": "at least 4.00, 5.00, once, met",
        "time, large size: TRL / lens_kernels": "at least 1.00, 0.89, once, missed",
    }


def test_write_tables_replaces_the_tables_of_the_page(tmp_path):
    rows = [made("floor", bars.BASE, "1:1000 2:1500"), made("trl", bars.BASE)]
    page = tmp_path / "page.md"
    text = f"a\n{bars.BEGIN}\nold\n{bars.END}\nb"
    page.write_text(text)
    for _ in range(2):
        bars.write_tables(page, rows)
        new = page.read_text()
        assert new.startswith(f"a\n{bars.BEGIN}\n\n| 1024 tokens") and new.endswith("\nb")
        assert "| FLOOR | 1.25 | 1.00 to 1.50 | 2 | 1.25 |\n\n| ratio |" in new
        assert "old" not in new and "TRL |" not in new and new.count("FLOOR") == 1
    for broken in (text.replace(bars.END, ""), text.replace(bars.BEGIN, "")):
        page.write_text(broken)
        with pytest.raises(ValueError, match="must hold the lines"):
            bars.write_tables(page, rows)
        assert page.read_text() == broken


def test_page_agrees_with_the_csv(tmp_path):
    copy, text = tmp_path / "page.md", speed_vs_peers.PAGE.read_text()
    copy.write_text(text)
    bars.write_tables(copy, tables.read_csv(environment.DATA / "cpu" / "speed_vs_peers.csv"))
    assert copy.read_text() == text


def test_docs_option_writes_the_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"{bars.BEGIN}\n{bars.END}\n")
    monkeypatch.setattr(speed_vs_peers, "PAGE", page)
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--sweep", "mask", "--rounds"]
    speed_vs_peers.main([*options, "1", "--docs", "--contenders", "dense"])
    assert page.read_text().count("not measured") == len(bars.BARS)
