"""The commands ``eval`` and ``inspect`` on tiny models: options, files, errors, help."""

from __future__ import annotations

import json
import re
import sys
from inspect import signature
from pathlib import Path

import pytest

from lens_kernels import cli
from lens_kernels.signature import argument_texts
from tests.support import tiny

FILES = ["data.json", "divergence_by_depth.png", "inspect.html", "lens_student.png"]
FILES += ["lens_teacher.png"]


@pytest.fixture
def data(tmp_path):
    """Return a file of one row that is answered and one that is too long."""
    path = tmp_path / "data.jsonl"
    rows = [("say: ", "a b"), ("too long " * 3, "c")]
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    return path


def evaluation(files, data, *more):
    argv = ["eval", "--model-path", files / "student", "--data-path", data]
    argv += ["--max-prompt-length", 12, "--max-new-tokens", 4, "--no-progress", *more]
    return [str(x) for x in argv]


def inspection(files, output, *more, text="a cat sat", teacher="teacher"):
    argv = ["inspect", "--student", files / "student", "--teacher", files / teacher]
    return [str(x) for x in [*argv, "--text", text, "--output", output, *more]]


def stopped(argv, capsys):
    """Return the message of a command that refuses its arguments, without the usage."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.split("error: ")[1]


def received(monkeypatch, target, argv, result=None):
    """Return the arguments by name that the command gives to its function."""
    module, name = target.rsplit(".", 1)
    function = getattr(sys.modules[module], name)
    calls = []

    def called(*args, **options):
        calls.append(signature(function).bind(*args, **options).arguments)
        return result

    called.__doc__, called.__signature__ = function.__doc__, signature(function)
    monkeypatch.setattr(target, called)
    assert cli.main(argv) == 0
    (call,) = calls
    return call


# --- lens-kernels eval

RESULT = {"cross_entropy": 2.5, "rouge_l": 31.0, "rouge_l_std": None, "rouge_l_by_seed": {}}
RESULT |= {"rows": 1, "skipped": 1}
GIVEN = {
    "model_path": "m",
    "data_path": "d",
    "output": "o",
    "prompt_style": "chat",
    "max_length": 5,
    "max_prompt_length": 6,
    "max_new_tokens": 7,
    "batch_size": 3,
    "seeds": [4, 2],
    "do_sample": False,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 9,
    "no_repeat_ngram_size": 2,
    "dtype": "bfloat16",
    "device": "meta",
    "allow_download": True,
    "progress": False,
}


def as_arguments(options):
    argv = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            argv += [f"--{option}", *map(str, values)]
    return argv


@pytest.mark.hf
def test_eval_writes_its_files_and_prints_the_table(files, data, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    assert cli.main(evaluation(files, data, "--output", tmp_path / "out", "--seeds", "3", "5")) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["settings"]["seeds"] == [3, 5]
    assert (result["rows"], result["skipped"]) == (1, 1)
    (line,) = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["answers"].keys() == {"3", "5"}
    shown = capsys.readouterr().out
    assert f"cross entropy, nats per token   {result['cross_entropy']:9.4f}\n" in shown
    assert re.search(r"^ROUGE-L, seed 5 ", shown, re.MULTILINE)


@pytest.mark.hf
def test_every_option_of_eval_reaches_the_function(files, monkeypatch):
    from lens_kernels.hf.evaluation import generation

    target = "lens_kernels.hf.evaluation.generation.evaluate_model"
    defaults = {k: p.default for k, p in signature(generation.evaluate_model).parameters.items()}
    assert GIVEN.keys() == defaults.keys()
    assert all(value != defaults[name] for name, value in GIVEN.items())
    argv = ["eval", *as_arguments(GIVEN)]
    assert received(monkeypatch, target, argv, RESULT) == GIVEN
    monkeypatch.undo()
    few = ["eval", "--model-path", "m", "--data-path", "d"]
    switches = {name: x for name, x in defaults.items() if isinstance(x, bool)}
    for more in ({}, switches):  # not given, and given as they are by default
        found = received(monkeypatch, target, [*few, *as_arguments(more)], RESULT)
        assert found == defaults | {"model_path": "m", "data_path": "d"}
        monkeypatch.undo()


@pytest.mark.hf
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "int8"], "dtype must be one of auto, float32"),
        (["--top-p", "2"], "top_p"),
        (["--seeds", "1", "1"], "seeds must hold at least one, all different"),
        (["--prompt-style", "none"], "prompt_style"),
        (["--model-path", "none"], "the tokenizer 'none' cannot be read"),
        (["--data-path", "none.jsonl"], "none.jsonl"),
        (["--max-prompt-length", "1"], "too long for max_prompt_length"),
        (["--output", __file__], "exists"),
    ],
)
def test_eval_says_what_does_not_fit(files, data, capsys, more, message):
    pytest.importorskip("rouge_score")
    assert cli.main(evaluation(files, data, *more)) == 1
    shown = capsys.readouterr()
    assert re.search(f"^lens-kernels eval: .*{re.escape(message)}", shown.err, re.MULTILINE)
    assert "cross entropy" not in shown.out


@pytest.mark.hf
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --model-path, --data-path"),
        ([*as_arguments({"model_path": "m", "data_path": "d"}), "--temp", "1"], "--temp 1"),
    ],
)
def test_eval_ends_with_usage(files, capsys, argv, message):
    assert message in stopped(["eval", *argv], capsys)


# --- lens-kernels inspect

INSPECT = {
    "text": "some text",
    "output": "out",
    "divergence": "tvd",
    "beta": 0.25,
    "lens_norm": False,
    "top_k": 2,
    "max_tokens": 7,
    "vocab_size": 60,
}


@pytest.mark.hf
def test_inspect_writes_its_files(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    assert cli.main(inspection(files, output, "--layers", "1:2", "2:3", "--top-k", "3")) == 0
    assert sorted(x.name for x in output.iterdir()) == FILES
    assert str(output / "inspect.html") in capsys.readouterr().out
    numbers = json.loads((output / "data.json").read_text())
    assert numbers["text"] == "a cat sat"
    assert "".join(numbers["tokens"]) == "a␣cat␣sat"
    pairs = [
        (x["student_depth"], x["teacher_depth"]) for x in numbers["comparisons"] if x["trained"]
    ]
    assert pairs == [(1, 2), (2, 3)]
    for name, layers in (("student", 3), ("teacher", 4)):
        assert (numbers[name]["name"], numbers[name]["depths"]) == (name, layers)
        assert len(numbers[name]["top_ids"][0][0]) == 3


@pytest.mark.hf
def test_every_option_of_inspect_reaches_the_function(files, tmp_path, monkeypatch):
    from lens_kernels.hf.inspection import inspect as module
    from lens_kernels.hf.model import loading

    asked = []
    for name in ("load_model", "load_tokenizer"):
        kept = getattr(loading, name)
        monkeypatch.setattr(
            loading,
            name,
            lambda path, *rest, kept=kept: asked.append((Path(path).name, *rest)) or kept(path),
        )
    parameters = signature(module.inspect).parameters
    assert INSPECT.keys() == parameters.keys() - {"student", "teacher", "tokenizer", "pairs"}
    argv = ["inspect", "--student", files / "student", "--teacher", files / "teacher"]
    argv = [*map(str, argv), *as_arguments(INSPECT), "--allow-download"]
    target = "lens_kernels.hf.inspection.inspect.inspect"
    got = received(monkeypatch, target, [*argv, "--layers", "1:2", "2:3"])
    models = got.pop("student"), got.pop("teacher")
    assert [len(model.model.layers) for model in models] == [3, 4]
    assert got.pop("tokenizer").get_vocab() == tiny.tokenizer().get_vocab()
    assert got.pop("pairs") == ((1, 2), (2, 3))
    assert got == INSPECT | {"output": Path("out")}
    assert asked == [
        ("student", True),
        ("teacher", True),
        ("student", "float32", True),
        ("teacher", "float32", True),
    ]
    monkeypatch.undo()
    got = received(monkeypatch, target, inspection(files, tmp_path))
    for name in INSPECT.keys() - {"text", "output"}:
        assert got[name] == parameters[name].default
    assert got.get("pairs") is None


@pytest.mark.hf
@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({}, ["--layers", "1:2", "7:3"], r"student layers must lie in \[1, 2\], got 7"),
        ({}, ["--layers", "1:4"], r"teacher layers must lie in \[1, 3\], got 4"),
        ({"text": ""}, [], "text must hold at least one token, got ''"),
        ({"teacher": "other"}, [], "different ids for 3 tokens"),
        ({"teacher": "none"}, [], "the tokenizer '.*none' cannot be read"),
        ({}, ["--divergence", "kl"], "divergence.*'kl'"),
        ({}, ["--top-k", "0"], "top_k must be at least 1, got 0"),
        ({}, ["--beta", "2"], "beta"),
    ],
)
def test_inspect_says_what_does_not_fit(files, tmp_path, capsys, options, more, message):
    pytest.importorskip("matplotlib")
    assert cli.main(inspection(files, tmp_path / "out", *more, **options)) == 1
    shown = capsys.readouterr().err
    assert re.search(f"^lens-kernels inspect: .*{message}", shown, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.hf
@pytest.mark.parametrize("pair", ["1", "1:2:3", "a:b", "1:", "1,2"])
def test_layers_are_pairs(files, tmp_path, capsys, pair):
    message = stopped(inspection(files, tmp_path, "--layers", "1:2", pair), capsys)
    assert f"--layers: must be two layers such as 5:8, got '{pair}'" in message


@pytest.mark.hf
def test_options_of_inspect_are_written_out(files, tmp_path, capsys):
    assert "--max 3" in stopped(inspection(files, tmp_path, "--max", "3"), capsys)


# --- both


@pytest.mark.hf
@pytest.mark.parametrize("name", ["eval", "inspect"])
def test_help_shows_every_text_once_and_the_default(name, capsys, monkeypatch):
    from lens_kernels.hf.evaluation.generation import evaluate_model
    from lens_kernels.hf.inspection.inspect import inspect

    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Args:" not in shown and "(default" not in shown
    function = {"eval": evaluate_model, "inspect": inspect}[name]
    if name == "eval":
        assert shown.count(function.__doc__.split("\n")[0]) == 1
    texts = argument_texts(function)
    parameters = signature(function).parameters
    assert texts.keys() == parameters.keys()
    for key in parameters.keys() - {"student", "teacher", "tokenizer", "pairs"}:
        default, option = parameters[key].default, key.replace("_", "-")
        (line,) = re.findall(rf"^  --{option}[ ,].*\n(?:    .*\n)?", shown, re.MULTILINE)
        assert texts[key] in line and shown.count(f" --{option} ") <= 3
        if isinstance(default, bool):
            assert f"Default: --{'' if default else 'no-'}{option}." in line
        elif default in (None, parameters[key].empty):
            assert "Default" not in line
        else:
            words = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert f" Default: {words}." in line


@pytest.mark.parametrize("name", ["eval", "inspect", "train"])
def test_without_transformers_it_says_what_to_install(name, capsys, monkeypatch):
    monkeypatch.setattr(cli, f"_{name}", lambda argv: __import__("a_module_that_is_missing"))
    assert cli.main([name]) == 1
    shown = capsys.readouterr().err
    expected = f"{name} needs a_module_that_is_missing: pip install 'lens-kernels[train]'\n"
    assert shown == f"lens-kernels {expected}"


@pytest.mark.parametrize(
    ("argv", "offline"),
    [
        (["--text", "allow this download"], True),
        (["--allow-download"], False),
        (["--allow_download", "true"], False),
        ([], True),
    ],
)
def test_the_libraries_are_offline_unless_downloads_are_allowed(monkeypatch, argv, offline):
    said = []
    monkeypatch.setattr(cli, "_quiet_libraries", lambda offline: said.append(offline))
    monkeypatch.setattr(cli, "_train", lambda argv: None)
    assert cli.main(["train", *argv]) == 0
    assert said == [offline]
