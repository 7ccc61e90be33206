"""The measuring tools: peak memory of real and fake tensors, time, and the recorded commit."""

import subprocess

import pytest
import torch

from benchmarks.support import environment, memory, timing
from benchmarks.support.environment import CPU
from benchmarks.support.memory import MIB

# The allowed error of measured memory, for scalars and one-time allocations of torch.
SLACK = MIB // 32


def watched(function):
    """Return the memory of a function twice: measured with real tensors, and counted with fake
    tensors."""
    return memory.measure(function, CPU), memory.track(function)


def allocations():
    """Allocate 12 MiB at the peak, and return 4 MiB.

    Each tensor takes 4 MiB. At the peak, the tensors b, c and d exist.
    """
    a = torch.empty(1024, 1024)
    b = a + 1
    del a
    c = b.view(-1, 2) * 2
    torch.mul(c, c, out=c)
    c.mul_(2).t_()
    d = b.view(-1, 2).t().contiguous()
    del b, d
    return c


@pytest.mark.parametrize(
    ("function", "peak", "kept"),
    [
        (lambda x: allocations(), 12, 4),
        # Views and in-place operations allocate no memory.
        (lambda x: x.view(-1, 4).t()[0].mul_(2), 0, 0),
        (lambda x: (x.add_(1), x * 2)[0], 4, 0),
    ],
    ids=["temporaries", "views", "in place"],
)
def test_both_instruments_count_temporaries_views_and_in_place_operators(function, peak, kept):
    x = torch.empty(MIB)
    for seen in watched(lambda: function(x)):
        assert seen.peak == pytest.approx(peak * MIB, abs=SLACK)
        assert seen.kept == pytest.approx(kept * MIB, abs=SLACK)


def test_rounds_are_interleaved_and_rotated(clock):
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.time_interleaved(functions, 2, CPU)
    assert "".join(order) == "abc" + "bca" + "cab"
    times = {name: dict(timings[name].by_round) for name in "abc"}
    assert times == {"a": {1: 6e3, 2: 8e3}, "b": {1: 4e3, 2: 9e3}, "c": {1: 5e3, 2: 7e3}}


def test_seconds_times_one_call(monkeypatch):
    calls, now = [], iter([5.0, 7.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    assert (timing.seconds(lambda: calls.append(1), CPU), calls) == (2.5, [1])


def test_ratios_use_only_common_rounds():
    floor, mine = timing.Timing.read("1:10.00 2:20.00 3:40.00"), timing.Timing({3: 80.0, 1: 12.0})
    assert mine.ratios(floor) == [1.2, 2.0]
    assert timing.Timing.read(str(mine)) == mine
    expected = {"rounds": 2, "median_ms": "46.0", "min_ms": "12.0", "max_ms": "80.0"}
    assert mine.columns(1) == expected
    assert timing.Timing({}).columns() == {"rounds": 0}


def test_commit_is_the_last_one_that_changed_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)

    def git(*args):
        settings = "-c", "user.name=a", "-c", "user.email=a@example.org"
        command = ["git", "-C", str(tmp_path), *settings, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for path in ("benchmarks/support/a.py", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1\n")
        git("add", ".")
        git("commit", "-qm", path)
    code = git("rev-parse", "--short=12", "HEAD~")
    assert environment.commit() == code
    (tmp_path / "benchmarks/support/a.py").write_text("2\n")
    assert environment.commit() == f"{code}-dirty"
