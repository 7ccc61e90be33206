"""Tuning of tiles, with a timer that makes times up, and tiles that fail as a compiler's would."""

import importlib.util

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler.errors import (  # noqa: E402
    CompilationError,
    CompileTimeAssertionFailure,
    UnsupportedLanguageConstruct,
)
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from lens_kernels import cli  # noqa: E402
from lens_kernels.backends.triton import (  # noqa: E402
    agreement,
    tiles,
    trials,
    tuned,
    tuning,
)
from lens_kernels.backends.triton.tiles import ARCHS, Sweep, Tile  # noqa: E402

CPU = torch.device("cpu")
GPU = "Some GPU"
SM_90 = ARCHS["sm_90"]
SIZES = (24, 40, 90, 6)  # widths, vocabulary, tokens
HEURISTIC = tiles.choose(Sweep.ROW_STATS, ARCHS["interpreter"], torch.float32, 24)
FAST, SLOW = Tile(16, 64, 32, 4, 2), Tile(32, 64, 32, 4, 3)
# Fastest of all, but for what is wrong with them.
BROKEN = [Tile(16, 128, 64, 8, stages) for stages in range(1, 8)]
KEYS = [
    (Sweep.ROW_STATS, 24), (Sweep.ROW_STATS, 40), (Sweep.ONLINE_KL, 24), (Sweep.ROW_SUMS, 24),
    (Sweep.GRADIENTS, 24),
]  # fmt: skip
COST = {HEURISTIC: 2.0, FAST: 1.0, SLOW: 3.0, **dict.fromkeys(BROKEN, 0.1)}


class Clock:
    """A timer for which each tile has a fixed time."""

    def __call__(self, function):
        (tile,) = function.args
        return COST[tile]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A GPU by its name alone."""
    monkeypatch.setattr(tuned, "device_name", lambda device: GPU)
    tuned.tiles.cache_clear()
    yield
    tuned.tiles.cache_clear()


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """The comparison with the torch backend, which in the interpreter takes long, as done."""
    asked = []
    monkeypatch.setattr(agreement, "check", lambda *args: asked.append(args))
    return asked


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Tune over the tiles given, and return the outcomes."""

    def run(*others, sizes=SIZES, **options):
        monkeypatch.setattr(trials, "candidates", lambda *args: list(others))
        options = {"path": tmp_path / "cache" / "tiles.json", "timer": Clock(), **options}
        return tuning.tune(*sizes, torch.float32, device=CPU, **options)

    return run


def instead(monkeypatch, name, replacements):
    """Replace a sweep's launch for some tiles."""
    original = getattr(tuning, name)

    def launch(*args):
        replacement = replacements.get(args[-1])
        return original(*args) if replacement is None else replacement(original, *args)

    monkeypatch.setattr(tuning, name, launch)


def raising(error):
    def launch(*args):
        raise error

    return launch


# Comparing


def test_nothing_is_tuned_where_the_kernels_are_wrong(tune, monkeypatch, tmp_path, compared):
    tune(FAST)
    assert compared == [(*SIZES, torch.float32, CPU)]

    def wrong(*args):
        raise RuntimeError("the kernels do not compute here what the torch backend does")

    monkeypatch.setattr(agreement, "check", wrong)
    path = tmp_path / "another" / "tiles.json"
    with pytest.raises(RuntimeError, match="do not compute here"):
        tune(FAST, path=path)
    assert not tuned.load(path, GPU, SM_90)


def test_tuning_is_complete_with_its_last_sweep(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "default_path", lambda: tmp_path / "cache" / "tiles.json")
    monkeypatch.setattr(tuned, "arch_of", lambda device: SM_90)
    assert not tuned.is_complete(None, CPU)
    with monkeypatch.context() as patch:
        instead(patch, "gradient_chunk", dict.fromkeys([HEURISTIC, FAST], raising(OSError())))
        with pytest.raises(OSError):
            tune(FAST)
    assert tuned.tiles(CPU) and not tuned.is_complete(None, CPU)
    tune(FAST)
    assert tuned.is_complete(None, CPU) and tuned.is_complete(torch.float32, CPU)
    assert not tuned.is_complete(torch.bfloat16, CPU)


# Searching


def test_the_fastest_tile_of_every_sweep_is_kept_and_read_back(tune, tmp_path):
    lines = []
    outcomes = tune(SLOW, FAST, say=lines.append)
    assert [(o.sweep, o.width) for o in outcomes] == KEYS
    for outcome in outcomes:
        assert outcome.heuristic == HEURISTIC and outcome.best == FAST
        assert outcome.times == {HEURISTIC: 2.0, SLOW: 3.0, FAST: 1.0} and not outcome.rejected
        assert outcome.row()[2:] == (
            "32x64x16, 4 warps, 1 stages", "2.000", "16x64x32, 4 warps, 2 stages", "1.000", "3", "0"
        )  # fmt: skip
    assert len(lines) == 16 and "row_stats, width 24, 2 of 3: 32x64x32" in lines[2]
    path = tmp_path / "cache" / "tiles.json"
    found = tuned.load(path, GPU, SM_90)
    assert found == {(sweep, torch.float32, width): FAST for sweep, width in KEYS}
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiles.json", "tiles.lock"]


def test_models_of_equal_width_share_the_row_statistics(tune):
    outcomes = tune(FAST, sizes=(24, 24, 90, 6))
    assert [o.sweep for o in outcomes] == list(Sweep)


def test_the_heuristic_stays_where_nothing_is_faster(tune):
    assert all(o.best == HEURISTIC for o in tune(SLOW, HEURISTIC))


LAUNCHES = {
    "row_stats": Sweep.ROW_STATS,
    "online_kl": Sweep.ONLINE_KL,
    "row_sums": Sweep.ROW_SUMS,
    "gradient_chunk": Sweep.GRADIENTS,
}
REJECTED = [
    OutOfResources(300000, 232448, "shared memory"),
    PTXASError("Internal Triton PTX codegen error\nptxas fatal: too much of it"),
    CompilationError(None, None, "cannot be compiled"),
    CompileTimeAssertionFailure(None, None, "an assertion"),
    UnsupportedLanguageConstruct(None, None, "unsupported"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_tiles_that_are_rejected_are_passed_over(tune, monkeypatch, launch):
    errors = dict(zip(BROKEN, REJECTED, strict=True))
    instead(monkeypatch, launch, {tile: raising(error) for tile, error in errors.items()})
    lines = []
    outcomes = [o for o in tune(*BROKEN, FAST, say=lines.append) if o.rejected]
    assert {o.sweep for o in outcomes} == {LAUNCHES[launch]}
    for outcome in outcomes:
        assert outcome.best == FAST and outcome.row()[-2:] == ("9", "7")
        for tile, error in errors.items():
            reason = outcome.rejected[tile]
            assert str(error).strip().splitlines()[-1].strip() in reason
            assert any(f"{tuning.describe(tile)}: rejected, {reason}" in line for line in lines)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("a bug"),
    ],
)
def test_other_errors_end_the_search_and_leave_what_was_found(tune, monkeypatch, tmp_path, error):
    instead(monkeypatch, "gradient_chunk", {FAST: raising(error)})
    with pytest.raises(type(error), match=str(error)[-10:]):
        tune(FAST)
    found = tuned.load(tmp_path / "cache" / "tiles.json", GPU, SM_90)
    assert len(found) == 4 and (Sweep.GRADIENTS, torch.float32, 24) not in found


def test_the_heuristic_s_tile_may_be_rejected_too(tune, monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *args: BROKEN[3])
    error = OutOfResources(2, 1, "shared memory")
    instead(monkeypatch, "row_stats", {BROKEN[3]: raising(error)})
    outcome = tune(FAST)[0]
    assert outcome.best == FAST and outcome.row()[2:4] == (
        "16x128x64, 8 warps, 4 stages",
        "rejected",
    )
    with pytest.raises(RuntimeError, match="no tile of row_stats runs here.*shared memory"):
        tune()


def wrong_by(factor):
    def launch(original, *args):
        result = original(*args)
        # The third sweep writes into its last argument but one.
        tensor = args[-2] if result is None else getattr(result, "log_sum", getattr(result, "f", 0))
        tensor[3] *= factor
        return result

    return launch


def test_tiles_with_other_results_do_not_win(tune, monkeypatch):
    factors = 1.5, 0.0, -1.0, float("nan"), float("inf"), 1.01, 0.99
    wrong = dict(zip(BROKEN, map(wrong_by, factors), strict=True))
    for launch in LAUNCHES:
        instead(monkeypatch, launch, wrong)
    for outcome in tune(*wrong, FAST):
        assert outcome.best == FAST
        for tile in wrong:
            assert "its results are off by" in outcome.rejected[tile]


def test_a_tile_that_writes_nothing_does_not_win_by_what_memory_holds(tune, monkeypatch):
    instead(monkeypatch, "gradient_chunk", {FAST: lambda original, *args: None})
    assert tune(FAST)[-1].rejected == {FAST: "its results are off by nan of the largest"}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sweep", Sweep)
def test_candidates_are_few_and_valid(arch, itemsize, sweep):
    found = trials.candidates(sweep, arch, itemsize)
    assert 0 < len(found) < 80
    assert all(tiles.objection(tile, sweep, arch, itemsize) is None for tile in found)
    assert all(max(v for _, v in trials.BLOCKS_NV) % tile.block_v == 0 for tile in found)


def test_a_folder_that_cannot_be_written_is_known_before_the_search(tune, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tune(path=tmp_path / "file" / "tiles.json", timer=None)


# The command

COMMAND = ["tune", "--student-width", "24", "--teacher-width", "40", "--vocab", "90"]
COMMAND += ["--tokens", "6", "--dtype", "float32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert cli.main(COMMAND) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert shown.err.startswith("lens-kernels tune: tiles are timed on a GPU, and torch ")


def test_without_triton_the_command_says_so(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    assert cli.main(COMMAND) == 1
    assert "triton is not installed: pip install triton" in capsys.readouterr().err


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "INTERPRETING", True)
    assert "TRITON_INTERPRET" in tuning.objection()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Let the command tune on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "objection", lambda: None)
    monkeypatch.setattr(trials, "candidates", lambda *args: [FAST])
    tune = tuning.tune
    options = {"device": CPU, "timer": Clock()}
    monkeypatch.setattr(tuning, "tune", lambda *args, **more: tune(*args, **more, **options))


def test_the_command_prints_a_table_and_where_it_is_kept(command, capsys):
    assert cli.main(COMMAND) == 0
    shown = capsys.readouterr().out
    assert "row_sums, width 24, 1 of 2: " in shown
    table = shown.split("\n\n")[1].splitlines()
    assert table[0].split()[:2] == ["sweep", "width"] and len(table) == 6
    assert [line.split()[:2] for line in table[1:]] == [[s.value, str(w)] for s, w in KEYS]
    assert f"kept in {tuned.default_path()}" in shown
    assert len(tuned.load(tuned.default_path(), GPU, SM_90)) == 5


def test_the_command_says_if_nothing_can_be_kept(command, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(COMMAND) == 1
    assert "results cannot be kept: " in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--vocab", "0"], ["--dtype", "float64"], ["--tokens", "-1"]])
def test_bad_arguments_end_with_usage(change, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*COMMAND, *change])
    assert stop.value.code == 2
