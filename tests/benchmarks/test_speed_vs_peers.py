"""The speed comparison: same work for all, nothing lost or mixed, and figures that follow."""

import itertools
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import harness, providers, shapes, speed_bars, speed_points, speed_vs_peers
from benchmarks.speed_points import FLOOR, SLOW, points, takes_part

CPU = torch.device("cpu")
DATA = harness.ROOT / "benchmarks" / "data" / "cpu" / "speed_vs_peers.csv"


def run(out, *options, contenders=("lens_kernels", "dense", "published")):
    """A run of tiny sizes; its rows by point and contender."""
    command = ["--quick", "--device", "cpu", "--out", str(out), *options]
    speed_vs_peers.main([*command, "--contenders", *contenders])
    return read(out)


def read(out):
    rows = harness.read_csv(out / "speed_vs_peers.csv")
    return {(row["point"], row["contender"]): row for row in rows}


def name(tokens=64, vocab=1000, pairs=1, masked=0):
    return f"tiny N{tokens} V{vocab} L{pairs} masked {masked:g}"


def test_a_run_from_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    everyone = ("lens_kernels", "triton", "dense", "published")
    rows = run(tmp_path, "--rounds", "3", "--sweep", *speed_points.SWEEPS, contenders=everyone)
    timed = {key: row["rounds"] for key, row in rows.items() if row["times_ms"]}
    small = [name(), name(32), name(128), name(32, 500), name(32, 2000), name(masked=0.5)]
    assert timed == {
        **{(place, key): "3" for place in small for key in (FLOOR, "lens_kernels", "dense")},
        **{(name(16), key): "3" for key in (FLOOR, "lens_kernels", "dense")},
        **{(name(pairs=5, masked=0.5), key): "3" for key in (FLOOR, "lens_kernels")},
        **{(place, "published"): "2" for place in (name(), name(masked=0.5))},
        (name(pairs=5, masked=0.5), "published"): "2",
        (name(128, 4000, 5), "lens_kernels"): "1",
    }
    for key in timed:
        row = rows[key]
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        floor = rows.get((key[0], FLOOR), {})
        ratios = speed_bars.ratios(row, floor)
        assert row["ratio_to_floor"] == (f"{statistics.median(ratios):.2f}" if ratios else "")
        assert ratios or row["sweeps"] == "memory"
        assert {"device", "threads", "torch", "trl", "liger_kernel", "commit"} <= row.keys()
    assert rows[name(), FLOOR]["sweeps"] == "tokens mask"
    assert rows["", "triton"]["note"] == "needs a GPU"
    assert rows[name(32), "published"]["note"] == "left out here, to save time"
    assert rows[name(), "published"]["note"] == "slow: every other round"
    assert (tmp_path / "speed_vs_peers.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert f"round 3 of 3: {name()}: dense" in printed
    assert printed.count("not measured") == len(speed_bars.BARS)  # tiny sizes are no proof


def test_memory_is_measured_for_ours_and_counted_for_dense(tmp_path, capsys):
    rows = run(tmp_path, "--sweep", "memory")
    ours, dense = (rows[name(128, 4000, 5), key] for key in ("lens_kernels", "dense"))
    assert (ours["memory_method"], dense["memory_method"]) == ("measured", "fake")
    assert (dense["times_ms"], dense["note"]) == ("", "not run: takes too long")
    (point,) = [p for p in points(64, CPU, quick=True) if p.sweeps == ("memory",)]
    for row in (ours, dense):
        contender = providers.CONTENDERS[row["contender"]]
        counted = speed_vs_peers.memory_vs_vocab.fake_memory(contender, point.job)
        above = (counted.peak - counted.kept) / 2**20  # the gradients are not temporary
        assert counted.kept > 0.4 * 2**20 and above > 8
        assert float(row["temporaries_mib"]) == pytest.approx(above, abs=0.1)
    assert run(tmp_path, "--sweep", "memory") == rows  # not measured again
    assert "lens_kernels is there already" in capsys.readouterr().out


class Stopped(BaseException):
    """What the interrupt key raises is of this kind."""


def test_a_run_that_was_stopped_keeps_whole_turns_and_goes_on(tmp_path, monkeypatch, capsys):
    calls = 0

    def stopping(function, device):
        nonlocal calls
        calls += 1
        function()
        if calls == 14:  # 2 points x ours before; 4 + 3 in round 1; 3 of 4 are missing in round 2
            raise Stopped
        return calls / 1e3

    options = "--sweep", "mask", "--rounds", "3"
    with monkeypatch.context() as patch:
        patch.setattr(harness, "seconds", stopping)
        with pytest.raises(Stopped):
            run(tmp_path, *options)
    before = read(tmp_path)
    kept = {key: row["times_ms"] for key, row in before.items() if row["times_ms"]}
    assert kept[name(), "dense"].startswith("1:") and "2:" in kept[name(), "dense"]
    assert "2:" not in "".join(v for k, v in kept.items() if k[0] == name(masked=0.5))
    capsys.readouterr()
    after = run(tmp_path, *options)
    for key, times in kept.items():
        assert after[key]["times_ms"].startswith(times)
    rounds = {row["times_ms"].count(":") for key, row in after.items() if key[1] != "published"}
    assert rounds == {3}
    printed = capsys.readouterr().out
    assert f"{name()}: rounds that are there already: {{'floor': 2" in printed
    assert "round 1" not in printed
    again = run(tmp_path, *options)
    assert again == after and "round" not in capsys.readouterr().out.replace("rounds", "")


def test_going_on_leaves_out_who_was_left_out_and_asks_again_who_was_missing(tmp_path, monkeypatch):
    options = "--sweep", "tokens", "--rounds", "1"
    both = ("lens_kernels", "published")
    with monkeypatch.context() as patch:
        gone = replace(speed_vs_peers.CONTENDERS["published"], gpu_only=True)
        patch.setitem(speed_vs_peers.CONTENDERS, "published", gone)
        assert run(tmp_path, *options, contenders=both)["", "published"]["note"] == "needs a GPU"
    for _ in range(2):
        rows = run(tmp_path, *options, contenders=both)
        assert ("", "published") not in rows
        assert rows[name(), "published"]["times_ms"] and not rows[name(32), "published"]["times_ms"]


def test_results_of_other_code_or_another_machine_are_not_added_to(tmp_path):
    run(tmp_path, "--sweep", "mask", "--rounds", "1")
    path = tmp_path / "speed_vs_peers.csv"
    before = path.read_text().replace(torch.__version__, "1.0")
    path.write_text(before)
    message = "was measured with torch '1.0', and this run has .*another folder to --out"
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, "--sweep", "mask")
    assert path.read_text() == before


@pytest.fixture
def wrong(monkeypatch):
    """Let a contender compute something else than it did when it was checked."""

    def install(key, loss):
        contender = replace(speed_vs_peers.CONTENDERS[key], load=lambda: loss, package="")
        monkeypatch.setitem(speed_vs_peers.CONTENDERS, key, contender)

    return install


def larger_than_checked(inputs):
    return providers.dense(inputs) * (1.01 if len(inputs.student_hidden[0]) > 24 else 1.0)


def test_who_computes_something_else_at_a_point_is_not_timed(tmp_path, wrong, capsys):
    wrong("dense", larger_than_checked)
    rows = run(tmp_path, "--sweep", "mask", "--rounds", "1", contenders=("lens_kernels", "dense"))
    printed = capsys.readouterr().out
    for place in (name(), name(masked=0.5)):
        note = rows[place, "dense"]["note"]
        assert "computes something else: loss" in note and f"dense: {note}" in printed
        assert not rows[place, "dense"]["times_ms"] and rows[place, "lens_kernels"]["times_ms"]


def test_wrong_gradients_are_seen_at_a_point(tmp_path, wrong):
    def half_the_gradient(inputs):
        loss = providers.dense(inputs)
        return (loss + loss.detach()) / 2 if len(inputs.student_hidden[0]) > 24 else loss

    wrong("dense", half_the_gradient)
    rows = run(tmp_path, "--sweep", "mask", "--rounds", "1", contenders=("lens_kernels", "dense"))
    assert "norm of gradient 0" in rows[name(), "dense"]["note"]


def test_ours_ends_the_run_if_it_is_wrong(tmp_path, wrong):
    wrong("trl", providers.dense)
    wrong("lens_kernels", larger_than_checked)
    everyone = ("lens_kernels", "dense")
    with pytest.raises(SystemExit, match="dense PyTorch agree, and differ from lens_kernels"):
        run(tmp_path, "--sweep", "mask", contenders=everyone)
    assert not read(tmp_path)
    with pytest.raises(RuntimeError, match="lens_kernels.* differs from the others: loss"):
        run(tmp_path, "--sweep", "memory", contenders=("trl", "lens_kernels"))
    wrong("lens_kernels", lambda inputs: providers.dense(inputs) * 2)
    with pytest.raises(RuntimeError, match="lens_kernels.* computes something else"):
        speed_vs_peers.gather(everyone, CPU)


def test_a_contender_that_is_added_is_compared_and_timed_with_the_others(
    tmp_path, wrong, monkeypatch
):
    clock = itertools.count(1)
    monkeypatch.setattr(harness, "seconds", lambda function, device: function() or next(clock))
    environment = harness.environment(CPU)  # of runs that are minutes apart
    monkeypatch.setattr(
        harness, "environment", lambda device: environment | {"date_utc": str(next(clock))}
    )
    options = "--sweep", "mask", "--rounds", "1"
    before = run(tmp_path, *options, contenders=("lens_kernels",))
    wrong("dense", larger_than_checked)
    after = run(tmp_path, *options)
    assert "computes something else" in after[name(), "dense"]["note"]
    for key in (FLOOR, "lens_kernels"):
        assert after[name(), key]["times_ms"] != before[name(), key]["times_ms"]
    again = run(tmp_path, *options)  # who was refused is not tried again by the same code
    assert again == after


@pytest.mark.parametrize(("key", "ends"), [("lens_kernels", True), ("dense", False)])
def test_who_fails_at_a_point_is_left_out_but_for_ours(tmp_path, wrong, key, ends):
    def failing(inputs):
        if len(inputs.student_hidden[0]) > 24:
            raise ValueError("of its own\nmore")
        return providers.dense(inputs)

    wrong(key, failing)
    options = "--sweep", "mask", "--rounds", "1"
    if ends:
        with pytest.raises(ValueError, match="of its own"):
            run(tmp_path, *options)
        return
    rows = run(tmp_path, *options)
    assert rows[name(), key]["note"] == "ValueError: of its own"
    assert rows[name(), "published"]["times_ms"]


def test_a_contender_that_ignores_the_mask_is_left_out(wrong):
    wrong("dense", lambda inputs: providers.dense(replace(inputs, mask=None)))
    present, missing = speed_vs_peers.gather(["lens_kernels", "dense"], CPU)
    assert [*present] == ["lens_kernels"] and "40% masked" in missing["dense"]


def test_what_does_not_fit_is_said_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_vs_peers.memory, "available", lambda: 700_000)
    rows = run(tmp_path, "--sweep", "mask", "--rounds", "1", contenders=("lens_kernels", "dense"))
    assert rows[name(), "dense"]["note"].startswith("does not fit: ")
    assert not rows[name(), "dense"]["times_ms"]
    monkeypatch.undo()
    times = run(tmp_path, "--sweep", "mask", "--rounds", "1")[name(), "dense"]["times_ms"]
    monkeypatch.setattr(speed_vs_peers.memory, "available", lambda: 700_000)
    rows = run(tmp_path, "--sweep", "mask", "--rounds", "1")
    assert times and rows[name(), "dense"]["times_ms"] == times  # what was measured is kept


def test_the_floor_multiplies_the_tokens_that_count(monkeypatch, tmp_path):
    seen = set()
    floor = speed_vs_peers.speed_vs_floor

    def products(inputs):
        hidden = inputs.student_hidden, inputs.teacher_hidden
        seen.add((inputs.mask, *(len(x) for side in hidden for x in side)))

    monkeypatch.setattr(floor, "products", products)
    run(tmp_path, "--sweep", "mask", "--rounds", "1", contenders=("lens_kernels",))
    assert seen == {(None, 64, 64), (None, 32, 32)}


def test_the_default_run_measures_every_bar():
    plan = points(1024, CPU)
    chosen = speed_vs_peers.parse([])
    for bar in speed_bars.BARS:
        for key, where in (bar.top, bar.bottom):
            (point,) = [
                p
                for p in plan
                if p.model == "gpt2"
                and (p.job.tokens, p.job.vocab, p.job.pairs, p.job.masked) == where
            ]
            assert {*point.sweeps} & {*chosen.sweep}
            assert key not in point.left_out and key in (FLOOR, *chosen.contenders)
            assert (point.job.student_width, point.job.teacher_width) == (768, 1600)
    assert {sweep for p in plan for sweep in p.sweeps} == {*speed_points.SWEEPS}
    assert len({p.key() for p in plan}) == len(plan)


def test_models_are_those_of_the_list():
    of_models = {p.model: p.job for p in points(1024, CPU) if p.sweeps == ("models",)}
    assert [*of_models] == ["gpt2", "tinyllama", "smollm2", "qwen2.5"]
    for key, job in of_models.items():
        model = shapes.MODELS[key]
        assert (job.vocab, job.student_width) == (model.vocab, model.student)
        assert (job.teacher_width, job.tokens) == (model.teacher, 256)


def test_slow_contenders_have_every_other_round():
    assert [n for n in range(6) if takes_part("trl", n)] == [1, 3, 5]
    assert [n for n in range(4) if takes_part("lens_kernels", n)] == [0, 1, 2, 3]
    assert [n for n in range(4) if takes_part("dense", n)] == [1, 2, 3]
    assert {*SLOW} < speed_vs_peers.CONTENDERS.keys()


def made(contender, where, times="", temporaries="", model="gpt2"):
    """A row as the verdict reads it."""
    sizes = dict(zip(("tokens", "vocab_entries", "pairs", "masked"), map(str, where), strict=True))
    median = harness.Timing(tuple(speed_bars.times({"times_ms": times}).values()))
    return {
        "contender": contender,
        "label": contender.upper(),
        "model": model,
        "times_ms": times,
        "temporaries_mib": temporaries,
        "median_ms": str(median.median_ms) if times else "",
        "min_ms": str(min(median.times_ms)) if times else "",
        "max_ms": str(max(median.times_ms)) if times else "",
        "rounds": str(len(median.times_ms)),
        "ratio_to_floor": "1.25",
        **sizes,
    }


def ends(rows):
    return {line[0]: line[1:] for line in speed_bars.verdict(rows)}


def test_verdict():
    base = speed_bars.BASE
    rows = [
        made("floor", base, "1:1000 2:2000 3:1000"),
        # The machine was slow in round 2; the ratio of the medians would be 1.2.
        made("lens_kernels", base, "1:1050 2:2040 3:1200"),
        made("dense", base, "1:2100 2:4080 3:2640"),
        made("trl", base, "1:4200 3:3000"),
        made("lens_kernels", speed_bars.HALF, "1:500 2:500 3:500"),
        made("lens_kernels", speed_bars.LARGE, "1:9000", "100"),
        made("dense", speed_bars.LARGE, "", "4990"),
        made("trl", speed_bars.LARGE, "1:8000", "500"),
        made("liger", base, "1:9999", model="tiny"),
    ]
    end = ends(rows)
    assert len(end) == len(speed_bars.BARS)
    measured = {what: cells for what, cells in end.items() if cells[3] != "not measured"}
    assert measured == {
        "lens_kernels / four products": ["at most 1.10", "1.05", "1.02 to 1.20", "met"],
        "dense PyTorch, as lean as can be / lens_kernels": [
            "at least 2.40",
            "2.00",
            "2.00 to 2.20",
            "missed",
        ],
        "TRL / lens_kernels": ["at least 3.00", "3.25", "2.50 to 4.00", "met"],
        "lens_kernels, 1024 / 512 tokens": ["at most 2.10", "2.40", "2.10 to 4.08", "missed"],
        "temporaries: dense PyTorch / lens_kernels": ["at least 50.00", "49.90", "once", "missed"],
        "temporaries: TRL / lens_kernels": ["at least 4.00", "5.00", "once", "met"],
        "time there: TRL / lens_kernels": ["at least 1.00", "0.89", "once", "missed"],
    }


def test_five_pairs_may_cost_as_much_as_doublings_of_them_may():
    one, five = (1024, 50257, 1, 0.5), speed_bars.FIVE
    for ms, end in ((5590, "met"), (5610, "missed")):
        rows = [made("lens_kernels", one, "1:1000"), made("lens_kernels", five, f"1:{ms}")]
        assert ends(rows)["lens_kernels, 5 pairs / 1, half masked"][-1] == end


def test_tables_of_the_readme():
    rows = [made("floor", speed_bars.BASE, "1:1000 2:1500"), made("trl", speed_bars.BASE)]
    text = f"a\n{speed_bars.BEGIN}\nold\n{speed_bars.END}\nb"
    new = speed_bars.with_tables(text, rows)
    assert new.startswith(f"a\n{speed_bars.BEGIN}\n\n| 1024 tokens") and new.endswith("\nb")
    assert "| FLOOR | 1.25 | 1.00 to 1.50 | 2 | 1.25 |\n\n| ratio |" in new
    assert "old" not in new and "TRL |" not in new
    assert speed_bars.with_tables(new, rows) == new
    for broken in (text.replace(speed_bars.END, ""), text.replace(speed_bars.BEGIN, "")):
        with pytest.raises(ValueError, match="must hold the lines"):
            speed_bars.with_tables(broken, rows)


def test_the_readme_says_what_the_csv_gives():
    """Without a CSV it says of each bar that it is not measured."""
    text = speed_vs_peers.README.read_text()
    assert speed_bars.with_tables(text, harness.read_csv(DATA)) == text


def test_the_option_writes_the_readme(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"{speed_bars.BEGIN}\n{speed_bars.END}\n")
    monkeypatch.setattr(speed_vs_peers, "README", readme)
    run(tmp_path, "--sweep", "mask", "--rounds", "1", "--readme", contenders=("dense",))
    assert readme.read_text().count("not measured") == len(speed_bars.BARS)


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)

    def git(*args):
        settings = "-c", "user.name=a", "-c", "user.email=a@example.org"
        command = ["git", "-C", str(tmp_path), *settings, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "a.py"
    script.write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "code")
    code = git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "README.md").write_text("x\n")
    git("add", ".")
    git("commit", "-qm", "document")
    assert harness.commit() == code
    script.write_text("2\n")
    assert harness.commit() == f"{code}-dirty"
