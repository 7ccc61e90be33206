"""Malformed input gives an error message in each command. Harmless changes change no result."""

import json
import os
import re
import shutil
import signal

import pytest
from safetensors.torch import load_file

from lens_kernels import cli
from tests.support.commands import arguments
from tests.support.fuzz import CLEAN, REFUSED, SAME, Input, mutated

SECONDS = 300  # the time limit in seconds for one command, on a slow machine
QUICK, ALL = 20, 400
SEEDS = [x if x < QUICK else pytest.param(x, marks=pytest.mark.slow) for x in range(ALL)]


def as_options(argv):
    """Return a command line as a dict of options."""
    options = {}
    for word in argv[1:]:
        if word.startswith("--"):
            name = word
            options[name] = []
        else:
            options[name].append(word)
    return {name: x[0] if len(x) == 1 else x for name, x in options.items()}


def result(given):
    """Return the results of a command that must stay the same after a harmless change."""
    out = given.folder / "out"
    if given.command == "train":
        return {name: x.tolist() for name, x in load_file(out / "model.safetensors").items()}
    if given.command == "inspect":
        return json.loads((out / "data.json").read_text())
    found = json.loads((out / "eval.json").read_text())
    return {name: found[name] for name in ("cross_entropy", "rouge_l", "rows", "skipped")}


@pytest.fixture(scope="module")
def valid(files, tmp_path_factory):
    """Return a folder with all files, and a valid input and its result for each command."""
    folder = shutil.copytree(files, tmp_path_factory.mktemp("valid") / "files")
    short = {"max_steps": 2, "save_steps": 1, "max_length": 40}
    train = as_options(arguments(folder, folder / "out", **short))
    for name in ("--student", "--teacher", "--data", "--output"):
        train[name] = folder / os.path.relpath(train[name], folder)
    data = {"--data": folder / "train.jsonl", "--max_new_tokens": 2, "--no_progress": []}
    out = {"--output": folder / "out"}
    models = {"--student": folder / "student", "--teacher": folder / "teacher"}
    inputs = {
        "train": Input(folder, "train", train),
        "eval": Input(folder, "eval", {"--student": folder / "student", **data, **out}),
        "inspect": Input(folder, "inspect", {**models, "--text": "a cat", **out}),
    }
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)
        cached = Input(folder, "train", {**train, "--teacher_cache": folder / "cache"})
        for name, given in [("cached", cached), *inputs.items()]:
            assert cli.main(given.argv()) == 0
            results[name] = result(given)
            if name == "train":
                (folder / "out" / "metrics.json").unlink()
                (folder / "out" / "model.safetensors").unlink()
                shutil.copytree(folder / "out", folder / "interrupted")
            shutil.rmtree(folder / "out")
    return folder, inputs, results


class Hung(BaseException):
    """Raised if a command exceeds its time limit."""


@pytest.fixture(autouse=True)
def _no_pages(monkeypatch):
    """Skip the page and pictures of ``inspect``, which take longer than everything else."""
    monkeypatch.setattr("lens_kernels.hf.inspection.figures.draw", lambda *_: {})
    monkeypatch.setattr("lens_kernels.hf.inspection.inspect.page", lambda *_: "")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_changed_input(valid, seed, tmp_path, capsys, monkeypatch):
    source, inputs, results = valid
    folder = shutil.copytree(source, tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    given, expected = mutated(inputs, folder, seed)
    outside = sorted(tmp_path.iterdir())

    def stop(*_):
        raise Hung(given.what)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        status = cli.main(given.argv())
    except SystemExit as error:
        status = error.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    shown = capsys.readouterr().err
    what = f"{given.command}: {given.what}\n{shown[-2000:]}"
    assert expected != REFUSED or status != 0, what
    assert expected != SAME or status == 0, what
    assert sorted(tmp_path.iterdir()) == outside, what
    if status == 0:
        key = "cached" if "--teacher_cache" in given.options else given.command
        assert expected == CLEAN or result(given) == results[key], what
    else:
        assert status in (1, 2), what
        assert "Traceback" not in shown, what
        last = re.search(r"^(?:usage: )?lens-kernels.*: .*\S", shown, re.MULTILINE)
        assert last, what
        assert "(traceback: " not in shown, what
