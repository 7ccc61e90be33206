"""Tuning of tiles, with a timer that makes times up, and tiles that fail as a compiler's would."""

import importlib.util
import json
import multiprocessing
import warnings

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler.errors import (  # noqa: E402
    CompilationError,
    CompileTimeAssertionFailure,
    UnsupportedLanguageConstruct,
)
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from lens_kernels import cache, cli, symmetric_lens_loss  # noqa: E402
from lens_kernels.backends.triton import (  # noqa: E402
    evaluate,
    interpreter,
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
    tuned._tiles.cache_clear()
    yield
    tuned._tiles.cache_clear()


@pytest.fixture
def interpreted():
    if not interpreter.INTERPRETING:
        pytest.skip("kernels run on a CPU in the interpreter alone: TRITON_INTERPRET=1")


@pytest.fixture
def tune(interpreted, monkeypatch, tmp_path):
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


def entry(tile=FAST, **changes):
    name = {"device": GPU, "triton": triton.__version__, "sweep": Sweep.ROW_SUMS}
    return tuned.Entry(**{**name, "dtype": torch.bfloat16, "width": 768, "tile": tile, **changes})


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
    assert len(lines) == 15 and "row_stats, width 24, 2 of 3: 32x64x32" in lines[1]
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


# Keeping


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Let lookups believe that kernels are compiled, for an H100; return the file they read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "INTERPRETING", False)
    monkeypatch.setattr(tuned, "arch_of", lambda device: SM_90)
    return tmp_path / "lens_kernels" / "tiles.json"


def look(**changes):
    key = {"sweep": Sweep.ROW_SUMS, "dtype": torch.bfloat16, "width": 768, **changes}
    return tuned.lookup(**key, device=CPU)


def test_lookup_knows_sweep_dtype_and_width(compiled):
    assert tuned.default_path() == compiled and look() is None
    tuned.save(compiled, entry(SLOW))
    tuned.save(compiled, entry(FAST))
    tuned.save(compiled, entry(SLOW, sweep=Sweep.GRADIENTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look() == FAST
        assert look(sweep=Sweep.GRADIENTS) == SLOW
        others = [{"sweep": Sweep.ONLINE_KL}, {"dtype": torch.float16}, {"width": 1024}]
        assert all(look(**other) is None for other in others)


def test_the_file_is_read_once(compiled, monkeypatch):
    tuned.save(compiled, entry())
    assert look() == FAST
    monkeypatch.setattr(tuned, "load", None)
    compiled.unlink()
    assert look() == FAST and look(width=1) is None


def test_the_interpreter_never_looks(compiled, monkeypatch):
    tuned.save(compiled, entry())
    monkeypatch.setattr(tuned, "INTERPRETING", True)
    monkeypatch.setattr(tuned, "load", None)
    assert look() is None


def test_a_call_uses_what_was_found(interpreted, compiled, monkeypatch):
    """Every sweep asks, by the narrower width."""
    asked = []

    def lookup(sweep, dtype, width, device):
        asked.append((sweep, dtype, width))
        return FAST if sweep is Sweep.GRADIENTS else None

    used = []
    gradient_chunk = evaluate.__globals__["gradient_chunk"]
    monkeypatch.setattr(tuned, "lookup", lookup)
    monkeypatch.setitem(
        evaluate.__globals__,
        "gradient_chunk",
        lambda *args: (used.append(args[-1]), gradient_chunk(*args)),
    )
    student = torch.randn(5, 24, requires_grad=True)
    heads = torch.randn(70, 24), torch.randn(70, 40)
    symmetric_lens_loss(student, torch.randn(5, 40), *heads, backend="triton").backward()
    assert asked == [
        (sweep, torch.float32, width) for sweep, width in KEYS if sweep is not Sweep.ONLINE_KL
    ]
    assert used == [FAST]


def damage(**changes):
    record = entry().record()
    return {**record, **changes}


TILE = entry().record()["tile"]
INVALID = {
    "not json": "{",
    "binary": b"\xff\xfe\x00",
    "other format": {"format": 0, "tiles": []},
    "a list": [],
    "no tiles": {"format": 1, "tiles": {}},
    "not a record": {"format": 1, "tiles": ["x"]},
    "no sweep": [{k: v for k, v in entry().record().items() if k != "sweep"}],
    "unknown sweep": [damage(sweep="row_something")],
    "unknown dtype": [damage(dtype="int8")],
    "no tile": [damage(tile=None)],
    "a field too few": [damage(tile={k: v for k, v in TILE.items() if k != "warps"})],
    "a field too many": [damage(tile={**TILE, "clusters": 2})],
    "a text": [damage(tile={**TILE, "warps": "4"})],
    "a truth value": [damage(tile={**TILE, "stages": True})],
    "width is a text": [damage(width="768")],
    "no power of two": [damage(tile={**TILE, "block_v": 96})],
    "too much shared memory": [damage(tile={**TILE, "block_k": 2048})],
    "too many registers": [damage(tile={**TILE, "block_n": 256, "block_v": 256, "block_k": 16})],
    "other triton": [damage(triton="1.0")],
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_what_makes_no_sense_is_ignored_with_one_warning_that_names_the_file(compiled, content):
    compiled.parent.mkdir()
    if isinstance(content, list) and content:
        content = {"format": 1, "tiles": content}
    if isinstance(content, bytes):
        compiled.write_bytes(content)
    else:
        compiled.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning) as caught:
        assert look() is None
        assert look() is None
    assert len(caught) == 1 and str(compiled) in str(caught[0].message)
    # A new result makes it whole again.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save(compiled, entry(SLOW))
        assert look() == SLOW


def test_valid_entries_beside_invalid_ones_are_used(compiled):
    tuned.save(compiled, entry(FAST))
    tuned.save(compiled, entry(Tile(96, 64, 32, 4, 2), width=1024))
    tuned.save(compiled, entry(Tile(96, 64, 32, 4, 2), width=2048))
    with pytest.warns(UserWarning, match="powers of two.*and 1 more"):
        assert look() == FAST
    assert look(width=1024) is None


def test_entries_of_other_devices_and_tritons_are_kept_but_not_used(compiled):
    tuned.save(compiled, entry(SLOW, device="Another GPU"))
    tuned.save(compiled, entry(SLOW, triton="1.0"))
    tuned.save(compiled, entry(FAST))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look() == FAST
    assert len(json.loads(compiled.read_text())["tiles"]) == 3


def test_a_file_that_cannot_be_read_is_replaced_with_a_warning(compiled):
    compiled.parent.mkdir()
    compiled.write_text("{")
    with pytest.warns(UserWarning, match="is replaced"):
        tuned.save(compiled, entry())
    assert look() == FAST


def test_a_write_that_fails_leaves_the_file_as_it_was(compiled, monkeypatch):
    tuned.save(compiled, entry(SLOW))
    monkeypatch.setattr(tuned.os, "replace", raising(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuned.save(compiled, entry(FAST))
    assert look() == SLOW
    assert sorted(p.name for p in compiled.parent.iterdir()) == ["tiles.json", "tiles.lock"]


def write(path, start):
    for width in range(start, start + 5):
        tuned.save(path, entry(width=width))


def test_processes_that_write_at_once_lose_nothing(compiled):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(compiled, 10 * i)) for i in range(4)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        if compiled.exists():
            json.loads(compiled.read_text())  # always whole
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert len(tuned.load(compiled, GPU, SM_90)) == 20


def test_a_folder_that_cannot_be_written_is_known_before_the_search(tune, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tune(path=tmp_path / "file" / "tiles.json", timer=None)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "lens_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "lens_kernels"


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
def command(interpreted, monkeypatch, tmp_path):
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
