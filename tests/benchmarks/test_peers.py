"""The speed comparison: contenders do equal work, and a run that resumes keeps earlier results."""

import statistics
from dataclasses import replace

import pytest

from benchmarks import speed_vs_peers
from benchmarks.peers import points as speed_points
from benchmarks.peers.points import FLOOR, SLOW, points, takes_part
from benchmarks.support import memory, products, tables, timing
from benchmarks.support.environment import CPU
from benchmarks.support.providers import CONTENDERS, dense
from benchmarks.support.timing import Timing

EVERYONE = ("lens_kernels", "dense", "published")
TWO = EVERYONE[:2]
MASK, TOKENS = (("--sweep", sweep, "--rounds", "1") for sweep in ("mask", "tokens"))


def run(out, *options, contenders=EVERYONE):
    """Run the comparison at tiny sizes, and return its CSV rows by point and contender."""
    command = ["--quick", "--device", "cpu", "--out", str(out), *options]
    speed_vs_peers.main([*command, "--contenders", *contenders])
    return read(out)


def read(out):
    rows = tables.read_csv(out / "speed_vs_peers.csv")
    return {(row["point"], row["contender"]): row for row in rows}


def name(tokens=64, vocab=1000, pairs=1, masked=0):
    return f"tiny N{tokens} V{vocab} L{pairs} masked {masked:g}"


def test_run_times_every_contender_and_writes_its_files(tmp_path, figures, clock, capsys):
    rows = run(tmp_path, "--rounds", "3", "--sweep", *speed_points.SWEEPS)
    timed = {key: row["rounds"] for key, row in rows.items() if row["times_ms"]}
    small = [name(), name(32), name(128), name(32, 500), name(32, 2000), name(masked=0.5)]
    five, large = name(pairs=5, masked=0.5), name(128, 4000, 5)
    assert timed == {
        **{(place, key): "3" for place in [*small, name(16)] for key in (FLOOR, *TWO)},
        **{(five, key): "3" for key in (FLOOR, "lens_kernels")},
        **{(place, "published"): "2" for place in (name(), name(masked=0.5), five)},
        (large, "lens_kernels"): "1",
    }
    for key in timed:
        row, times = rows[key], Timing.read(rows[key]["times_ms"])
        assert row.items() >= (times.columns() | {"rounds": timed[key]}).items()
        ratios = times.ratios(Timing.read(rows.get((key[0], FLOOR), {}).get("times_ms", "")))
        assert row["ratio_to_floor"] == (f"{statistics.median(ratios):.2f}" if ratios else "")
        assert ratios or row["sweeps"] == "memory"
        assert {"device", "threads", "torch", "trl", "liger_kernel", "commit"} <= row.keys()
    # Calls 1 to 8 are warm-up calls of lens_kernels, one at each point (set of sizes). The order of
    # contenders rotates: round 1 starts with the second contender.
    assert rows[name(), "lens_kernels"]["times_ms"].startswith("1:9000.00 2:")
    assert rows[name(), FLOOR]["times_ms"].startswith("1:12000.00 2:")
    assert rows[name(), FLOOR]["sweeps"] == "tokens mask"
    assert rows[name(32), "published"]["note"] == "left out at this point to save time"
    assert rows[name(), "published"]["note"] == "slow: every other round"
    assert (tmp_path / "speed_vs_peers.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert f"round 3 of 3: {name()}: dense" in printed
    # The performance limits apply only to full sizes.
    assert printed.count("not measured") == len(speed_vs_peers.bars.BARS)


def test_memory_is_measured_for_ours_and_counted_for_dense(tmp_path):
    rows = run(tmp_path, "--sweep", "memory")
    ours, other = (rows[name(128, 4000, 5), key] for key in TWO)
    assert (ours["memory_method"], other["memory_method"]) == ("measured", "fake")
    assert (other["times_ms"], other["note"]) == ("", "not run: takes too long")
    (point,) = [p for p in points(64, CPU, quick=True) if p.sweeps == ("memory",)]
    for row in (ours, other):
        counted = CONTENDERS[row["contender"]].fake_memory(point.job)
        # The column does not include the memory of gradients.
        above = (counted.peak - counted.kept) / memory.MIB
        assert above > 8 and float(row["temporaries_mib"]) == pytest.approx(above, abs=0.1)
    # A second run finds all results in the CSV, and measures nothing.
    assert run(tmp_path, "--sweep", "memory") == rows


def test_interrupted_run_keeps_complete_turns_and_resumes(tmp_path, clock, monkeypatch, capsys):
    def stopping(function, device):
        elapsed = clock(function, device)
        # The 14th call is in round 2, after 2 warm-up calls and the 7 calls of round 1.
        if elapsed == 14:
            raise KeyboardInterrupt
        return elapsed

    options = "--sweep", "mask", "--rounds", "3"
    with monkeypatch.context() as patch:
        patch.setattr(timing, "seconds", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *options)
    kept = {key: row["times_ms"] for key, row in read(tmp_path).items() if row["times_ms"]}
    assert kept[name(), "dense"].startswith("1:") and "2:" in kept[name(), "dense"]
    assert "2:" not in "".join(v for k, v in kept.items() if k[0] == name(masked=0.5))
    capsys.readouterr()
    after = run(tmp_path, *options)
    assert all(after[key]["times_ms"].startswith(times) for key, times in kept.items())
    rounds = {row["times_ms"].count(":") for key, row in after.items() if key[1] != "published"}
    assert rounds == {3}
    printed = capsys.readouterr().out
    assert f"{name()}: rounds measured already: {{'floor': 2" in printed
    assert "round 1" not in printed
    assert run(tmp_path, *options) == after


def test_resumed_run_retries_missing_contenders_but_not_skipped_points(tmp_path, monkeypatch):
    options = {"contenders": ("lens_kernels", "published")}
    with monkeypatch.context() as patch:
        gone = replace(speed_vs_peers.CONTENDERS["published"], gpu_only=True)
        patch.setitem(speed_vs_peers.CONTENDERS, "published", gone)
        assert run(tmp_path, *TOKENS, **options)["", "published"]["note"] == "needs a GPU"
    for _ in range(2):
        rows = run(tmp_path, *TOKENS, **options)
        assert ("", "published") not in rows
        assert rows[name(), "published"]["times_ms"] and not rows[name(32), "published"]["times_ms"]


@pytest.fixture
def install(monkeypatch):
    """Return a function that replaces a contender's loss."""
    known = speed_vs_peers.CONTENDERS

    def install(key, loss):
        monkeypatch.setitem(known, key, replace(known[key], load=lambda: loss, package=""))

    return install


def at_a_point(change):
    """Return a loss that passes the check at a small size, and is ``change`` at larger sizes."""
    return lambda inputs: (change if len(inputs.student_hidden[0]) > 24 else dense)(inputs)


def half_the_gradient(inputs):
    loss = dense(inputs)
    return (loss + loss.detach()) / 2


def failing(inputs):
    raise ValueError("of its own\nmore")


larger = at_a_point(lambda inputs: dense(inputs) * 1.01)


@pytest.mark.parametrize(
    ("loss", "note"),
    [
        (larger, "wrong result: loss"),
        (at_a_point(half_the_gradient), "wrong result: norm of gradient 0"),
        (at_a_point(failing), "ValueError: of its own"),
    ],
)
def test_contender_that_is_wrong_or_fails_at_a_point_is_not_timed(
    tmp_path, install, capsys, loss, note
):
    install("dense", loss)
    rows = run(tmp_path, *MASK, contenders=TWO)
    printed = capsys.readouterr().out
    for place in (name(), name(masked=0.5)):
        found = rows[place, "dense"]["note"]
        assert note in found and "\n" not in found and f"dense: {found}" in printed
        assert not rows[place, "dense"]["times_ms"] and rows[place, "lens_kernels"]["times_ms"]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (larger, SystemExit, "dense PyTorch agree, but lens_kernels"),
        (lambda inputs: dense(inputs) * 2, RuntimeError, "lens_kernels.* gives a wrong result"),
        (at_a_point(failing), ValueError, "of its own"),
    ],
    ids=["at a point", "everywhere", "fails"],
)
def test_run_ends_if_lens_kernels_is_wrong_or_fails(tmp_path, install, loss, error, message):
    install("lens_kernels", loss)
    with pytest.raises(error, match=message):
        run(tmp_path, *MASK, contenders=TWO)


def test_added_contender_is_checked_and_timed_with_the_others(tmp_path, install, clock):
    before = run(tmp_path, *MASK, contenders=("lens_kernels",))
    install("dense", larger)
    after = run(tmp_path, *MASK)
    assert "gives a wrong result" in after[name(), "dense"]["note"]
    for key in (FLOOR, "lens_kernels"):
        assert after[name(), key]["times_ms"] != before[name(), key]["times_ms"]
    # A contender with a wrong result is not run again while the code stays the same.
    assert run(tmp_path, *MASK) == after


def test_contenders_that_exceed_memory_are_reported_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 700_000)
    row = run(tmp_path, *MASK, contenders=TWO)[name(), "dense"]
    assert row["note"].startswith("does not fit: ") and not row["times_ms"]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: 1 << 40)
        times = run(tmp_path, *MASK)[name(), "dense"]["times_ms"]
    # With little memory again, earlier times are kept.
    assert times and run(tmp_path, *MASK)[name(), "dense"]["times_ms"] == times


def test_floor_multiplies_only_counted_tokens(monkeypatch, tmp_path):
    seen = set()

    def multiply(inputs):
        (student,), (teacher,) = inputs.student_hidden, inputs.teacher_hidden
        seen.add((inputs.mask, len(student), len(teacher)))

    monkeypatch.setattr(products, "products", multiply)
    run(tmp_path, *MASK, contenders=("lens_kernels",))
    assert seen == {(None, 64, 64), (None, 32, 32)}


def test_slow_contenders_run_in_every_other_round():
    rounds = {key: [n for n in range(6) if takes_part(key, n)] for key in ("trl", "lens_kernels")}
    assert rounds == {"trl": [1, 3, 5], "lens_kernels": [*range(6)]}
    assert {*SLOW} < speed_vs_peers.CONTENDERS.keys()
    first, *others = ("dense_kl_div" in point.left_out for point in points(1024, CPU))
    assert not first and all(others)
