"""The search for the fastest tiles, with made-up times and with tiles that fail."""

import importlib.util

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from lens_kernels import cli  # noqa: E402
from lens_kernels.backends.triton import agreement  # noqa: E402
from lens_kernels.backends.triton import tune as tuning  # noqa: E402
from lens_kernels.backends.triton.kernels.launch import Tile  # noqa: E402
from lens_kernels.backends.triton.tiles import search, sizes, store  # noqa: E402
from lens_kernels.backends.triton.tiles.sizes import ARCHS, Sweep  # noqa: E402

CPU = torch.device("cpu")
# The hidden sizes of student and teacher, the vocabulary size, and the number of tokens.
SIZES = (24, 40, 90, 6)
DEFAULT = sizes.default(Sweep.ROW_STATS, ARCHS["interpreter"], torch.float32, 24)
FAST, SLOW = Tile(16, 64, 32, 4, 2), Tile(32, 64, 32, 4, 3)
# The tiles with the lowest made-up times. Tests make their results wrong or raise errors.
BROKEN = [Tile(16, 128, 64, 8, stages) for stages in range(1, 6)]
KEYS = [
    (Sweep.ROW_STATS, 24), (Sweep.ROW_STATS, 40), (Sweep.ONLINE_KL, 24), (Sweep.ROW_SUMS, 24),
    (Sweep.GRADIENTS, 24),
]  # fmt: skip
COST = {DEFAULT: 2.0, FAST: 1.0, SLOW: 3.0, **dict.fromkeys(BROKEN, 0.1)}
# The functions that launch the sweeps, in the order of the enum ``Sweep``.
LAUNCHES = ["row_stats", "online_kl", "row_sums", "gradient_chunk"]


def clock(function):
    """Return the made-up time of the tile that is being timed."""
    return COST[function.args[-1]]


@pytest.fixture(autouse=True)
def compared(monkeypatch, tmp_path, some_gpu):
    """Record the comparisons with the torch backend instead of running them."""
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(agreement, "check", lambda *args: asked.append(args))
    return asked


@pytest.fixture
def tune(monkeypatch):
    """Return a function that tunes over the given tiles and returns the outcomes."""

    def run(*others, sizes=SIZES, **options):
        monkeypatch.setattr(search, "candidates", lambda *args: list(others))
        return tuning.tune(*sizes, torch.float32, device=CPU, timer=clock, **options)

    return run


def stored():
    return store.load("Some GPU", ARCHS["sm_90"])


def instead(monkeypatch, name, replacements):
    """Replace the function that launches a sweep, for the tiles in ``replacements``."""
    original = getattr(search, name)

    def launch(*args):
        replacement = replacements.get(args[-1])
        return original(*args) if replacement is None else replacement(original, *args)

    monkeypatch.setattr(search, name, launch)


def raising(error):
    def launch(*args):
        raise error

    return launch


def test_wrong_kernels_are_not_tuned(tune, monkeypatch):
    monkeypatch.setattr(agreement, "check", raising(RuntimeError("the kernels disagree")))
    with pytest.raises(RuntimeError, match="disagree"):
        tune(FAST)
    assert not stored()


def test_tuning_finishes_only_with_its_last_sweep(tune, monkeypatch):
    monkeypatch.setattr(store, "INTERPRETING", False)
    with monkeypatch.context() as patch:
        instead(patch, "gradient_chunk", dict.fromkeys([DEFAULT, FAST], raising(OSError())))
        with pytest.raises(OSError):
            tune(FAST)
    assert store.tiles(CPU) and not store.is_tuned(None, CPU)
    tune(FAST)
    assert store.is_tuned(None, CPU) and store.is_tuned(torch.float32, CPU)
    assert not store.is_tuned(torch.bfloat16, CPU)
    monkeypatch.setattr(store, "INTERPRETING", True)
    assert not store.is_tuned(None, CPU)


def test_the_fastest_tile_of_every_sweep_is_stored_and_read_back(tune, compared):
    lines = []
    outcomes = tune(SLOW, FAST, say=lines.append)
    assert compared == [(*SIZES, torch.float32, CPU)]
    assert [(o.sweep, o.width) for o in outcomes] == KEYS
    for outcome in outcomes:
        assert outcome.default == DEFAULT and outcome.best == FAST
        assert outcome.times == {DEFAULT: 2.0, SLOW: 3.0, FAST: 1.0} and not outcome.rejected
        assert outcome.row()[2:] == (
            str(DEFAULT), "2.000", "16x64x32, 4 warps, 2 stages", "1.000", "3", "0"
        )  # fmt: skip
    assert len(lines) == 16 and f"row_stats, width 24, 2 of 3: {SLOW}: 3.000 ms" in lines
    assert stored() == {(sweep, torch.float32, width): FAST for sweep, width in KEYS}
    assert sorted(p.name for p in store.path().parent.iterdir()) == ["tiles.json", "tiles.lock"]


REJECTED = [
    OutOfResources(300000, 232448, "shared memory"),
    PTXASError("Internal Triton PTX codegen error\nptxas fatal: too much of it"),
    CompilationError(None, None, "cannot be compiled"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
]


def test_rejected_tiles_are_skipped(tune, monkeypatch):
    errors = dict(zip(BROKEN, REJECTED, strict=True))
    for launch in LAUNCHES:
        instead(monkeypatch, launch, {tile: raising(error) for tile, error in errors.items()})
    lines = []
    for outcome in tune(*BROKEN, FAST, say=lines.append):
        assert outcome.best == FAST and outcome.row()[-2:] == ("7", "5")
        for tile, error in errors.items():
            reason = outcome.rejected[tile]
            assert str(error).strip().splitlines()[-1].strip() in reason
            assert any(f"{tile}: rejected, {reason}" in line for line in lines)


def test_other_errors_end_the_search_and_keep_earlier_results(tune, monkeypatch):
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    for other in (error, torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug")):
        assert search.rejection(other) is None
    instead(monkeypatch, "row_sums", {FAST: raising(error)})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(FAST)
    assert [key[0] for key in stored()] == [Sweep.ROW_STATS, Sweep.ROW_STATS, Sweep.ONLINE_KL]


def test_the_default_tile_may_be_rejected_too(tune, monkeypatch):
    monkeypatch.setattr(sizes, "default", lambda *args: BROKEN[3])
    error = OutOfResources(2, 1, "shared memory")
    instead(monkeypatch, "row_stats", {BROKEN[3]: raising(error)})
    outcome = tune(FAST)[0]
    assert outcome.best == FAST and outcome.row()[2:4] == (str(BROKEN[3]), "rejected")
    with pytest.raises(RuntimeError, match="no tile for the sweep row_stats runs.*shared memory"):
        tune()


def wrong_by(factor):
    def launch(original, *args):
        result = original(*args)
        # Sweep 3 returns None and writes into its second-to-last argument.
        tensor = args[-2] if result is None else getattr(result, "log_sum", getattr(result, "f", 0))
        tensor[3] *= factor
        return result

    return launch


def test_tiles_with_other_results_do_not_win(tune, monkeypatch):
    factors = 0.0, -1.0, float("nan"), float("inf"), 1.01
    wrong = dict(zip(BROKEN, map(wrong_by, factors), strict=True))
    for launch in LAUNCHES:
        instead(monkeypatch, launch, wrong)
    for outcome in tune(*wrong, FAST):
        assert outcome.best == FAST
        for tile in wrong:
            assert "the results are off by" in outcome.rejected[tile]


def test_a_tile_that_writes_nothing_is_rejected(tune, monkeypatch):
    instead(monkeypatch, "gradient_chunk", {FAST: lambda original, *args: None})
    assert tune(FAST)[-1].rejected == {FAST: "the results are off by nan of the largest result"}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sweep", Sweep)
def test_candidates_and_defaults_are_valid(arch, dtype, sweep):
    found = search.candidates(sweep, arch, dtype.itemsize)
    assert 0 < len(found) < 80
    assert all(max(v for _, v in search.BLOCKS_NV) % tile.block_v == 0 for tile in found)
    for width in (576, 1024, 2048, 8192):
        found += [sizes.default(sweep, arch, dtype, width, extras) for extras in (False, True)]
    for tile in found:
        assert sizes.invalid_reason(tile, sweep, arch, dtype.itemsize) is None


# Tests of the command ``lens-kernels tune``

COMMAND = ["tune", "--student-width", "24", "--teacher-width", "40", "--vocab", "90"]
COMMAND += ["--tokens", "6", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("GPU", "tiles are timed on a GPU, and torch "),
        ("triton", "triton is not installed: pip install triton"),
        ("compiler", "TRITON_INTERPRET"),
    ],
)
def test_a_missing_requirement_is_reported_in_one_line(capsys, monkeypatch, missing, reason):
    find = importlib.util.find_spec
    absent = "triton" if missing == "triton" else "no such module"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing == "compiler")
    monkeypatch.setattr(tuning, "INTERPRETING", missing == "compiler")
    assert cli.main(COMMAND) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert shown.err.startswith("lens-kernels tune: ") and reason in shown.err


@pytest.fixture
def command(monkeypatch):
    """Make ``lens-kernels tune`` run on the CPU, with made-up times."""
    monkeypatch.setattr(tuning, "unsupported_reason", lambda: None)
    monkeypatch.setattr(search, "candidates", lambda *args: [FAST])
    tune = tuning.tune
    options = {"device": CPU, "timer": clock}
    monkeypatch.setattr(tuning, "tune", lambda *args, **more: tune(*args, **more, **options))


def test_the_command_prints_a_table_and_the_path(command, capsys):
    assert cli.main(COMMAND) == 0
    shown = capsys.readouterr().out
    assert "row_sums, width 24, 1 of 2: " in shown
    table = shown.split("\n\n")[1].splitlines()
    assert table[0].split()[:2] == ["sweep", "width"] and len(table) == 6
    assert [line.split()[:2] for line in table[1:]] == [[s.value, str(w)] for s, w in KEYS]
    assert f"stored in {store.path()}" in shown
    assert len(stored()) == 5


def test_a_read_only_folder_is_reported_before_the_search(
    command, compared, capsys, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(COMMAND) == 1
    assert "cannot store the results: " in capsys.readouterr().err and not compared
