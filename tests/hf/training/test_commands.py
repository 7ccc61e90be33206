"""The commands ``eval`` and ``inspect`` on tiny models: options, files, errors and help."""

import json
import re
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml

from lens_kernels import cli, failures
from lens_kernels.arguments import argument_texts
from lens_kernels.hf.evaluation import generation
from lens_kernels.hf.inspection import command as inspecting
from tests.support import tiny
from tests.support.commands import write_rows

PICTURES = ["divergence_by_depth", "lens_by_depth", "lens_student", "lens_teacher"]
FILES = ["data.json", "inspect.html", *(f"{x}.{y}" for x in PICTURES for y in ("png", "svg"))]


@pytest.fixture
def data(tmp_path):
    """Return a data file with two rows. The prompt of the second row is too long."""
    prompts = {"say: ": "a b", "too long " * 3: "c"}
    write_rows(tmp_path / "data", [{"prompt": p, "completion": c} for p, c in prompts.items()])
    return tmp_path / "data"


def as_arguments(options):
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def evaluation(files, data, *more):
    options = {"student": files / "student", "data": data, "max_prompt_length": 12}
    options |= {"max_new_tokens": 4, "progress": False}
    return ["eval", *as_arguments(options), *map(str, more)]


def inspection(files, output, *more, text="a cat sat", teacher="teacher"):
    models = {"student": files / "student", "teacher": files / teacher}
    return ["inspect", *as_arguments(models | {"text": text, "output": output}), *more]


def stopped(argv, capsys):
    """Run a command with invalid arguments, and return its error message without the usage text."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def received(monkeypatch, target, argv, result=None):
    """Run a command, and return the arguments that its function receives, by name."""
    module, name = target.rsplit(".", 1)
    function, calls = getattr(sys.modules[module], name), []

    def called(*args, **options):
        calls.append(signature(function).bind(*args, **options).arguments)
        return result

    called.__doc__, called.__signature__ = function.__doc__, signature(function)
    with monkeypatch.context() as patch:
        patch.setattr(target, called)
        assert cli.main(argv) == 0
    (call,) = calls
    return call


RESULT = {"cross_entropy": 2.5, "rouge_l": 31.0, "rouge_l_std": None, "rouge_l_by_seed": {}}
RESULT |= {"rows": 1, "skipped": 1}
SAY = {"say": cli._say}
GIVEN = yaml.safe_load("""{
    "rouge_tokenizer": "unicode",
student: m, data: d, output: o, prompt_style: chat, max_length: 5, max_prompt_length: 6,
max_new_tokens: 7, batch_size: 3, seeds: [4, 2], do_sample: false, temperature: 0.5, top_p: 0.25,
top_k: 9, no_repeat_ngram_size: 2, dtype: bfloat16, device: meta, allow_download: true,
progress: false,
}""")
INSPECT = yaml.safe_load("""{
student: [s, r], teacher: t, layers: ["1:2", "2:3"], allow_download: true, text: [some text],
data: d, max_texts: 3, prompt_style: chat, dtype: auto, device: meta,
output: out, divergence: tvd, beta: 0.25, lens_norm: false, top_k: 2,
max_tokens: 7, vocab_size: 60,
}""")


def test_eval_writes_its_files_and_prints_the_table(files, data, tmp_path, capsys):
    assert cli.main(evaluation(files, data, "--output", tmp_path / "out", "--seeds", "3", "5")) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (result["settings"]["seeds"], result["rows"], result["skipped"]) == ([3, 5], 1, 1)
    assert generation.table(result) in capsys.readouterr().out


def test_every_option_of_eval_reaches_the_function(monkeypatch):
    target = "lens_kernels.hf.evaluation.generation.evaluate_model"
    defaults = {k: p.default for k, p in signature(generation.evaluate_model).parameters.items()}
    del defaults["say"]
    assert GIVEN.keys() == defaults.keys()
    assert all(value != defaults[name] for name, value in GIVEN.items())
    assert received(monkeypatch, target, ["eval", *as_arguments(GIVEN)], RESULT) == GIVEN | SAY
    few = {"student": "m", "data": "d"}
    switches = {name: x for name, x in defaults.items() if isinstance(x, bool)}
    # The command line has no switches in the first round. In the second round it sets every switch
    # to its default value.
    for more in ({}, switches):
        found = received(monkeypatch, target, ["eval", *as_arguments(few | more)], RESULT)
        assert found == defaults | few | SAY


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1", "1"], "seeds must hold at least one seed, all different"),
        (["--student", "none"], "the tokenizer 'none' cannot be read"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--output", __file__], "exists"),
    ],
)
def test_eval_reports_bad_options(files, data, capsys, more, message):
    assert cli.main(evaluation(files, data, *more)) == 1
    shown = capsys.readouterr()
    assert re.search(f"^lens-kernels eval: .*{re.escape(message)}", shown.err, re.MULTILINE)
    assert "cross entropy" not in shown.out


def test_inspect_writes_its_files(files, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(inspection(files, output, "--layers", "1:2", "2:3", "--top-k", "3")) == 0
    assert sorted(x.name for x in output.iterdir()) == sorted(FILES)
    assert str(output / "inspect.html") in capsys.readouterr().out
    numbers = json.loads((output / "data.json").read_text())
    (data,) = numbers["texts"]
    assert (data["text"], "".join(data["tokens"])) == ("a cat sat", "a␣cat␣sat")
    compared = data["comparisons"]["student"]
    found = [(x["student_depth"], x["teacher_depth"], x["trained"]) for x in compared]
    assert [pair for *pair, trained in found if trained] == [[1, 2], [2, 3]]
    assert numbers["names"] == {"student": "student", "teacher": "teacher"}
    for name, layers in (("student", 3), ("teacher", 4)):
        assert data["models"][name]["depths"] == layers
        assert len(data["models"][name]["top_ids"][0][0]) == 3


@pytest.fixture
def undrawn(monkeypatch):
    """Skip the pictures of ``inspect``, which take longer than everything else."""
    monkeypatch.setattr("lens_kernels.hf.inspection.figures.draw", lambda *_: {})


def test_inspect_reads_several_models_and_texts_from_a_file(files, tmp_path, undrawn):
    (tmp_path / "texts.txt").write_text("\ufeffa cat\n\n \nthe dog ran\nno\n")
    models = [files / "student", files / "teacher"]
    for source in (tmp_path / "texts.txt", files / "train.jsonl"):
        options = {"student": models, "data": source, "max_texts": 2, "dtype": "bfloat16"}
        options |= {"device": "cpu", "output": tmp_path / "out"}
        assert cli.main(["inspect", *as_arguments(options)]) == 0
        numbers = json.loads((tmp_path / "out" / "data.json").read_text())
        assert numbers["names"] == {"student 1": "student", "student 2": "teacher"}
        texts = [x["text"] for x in numbers["texts"]]
        if source.suffix == ".txt":
            assert texts == ["a cat", "the dog ran"]
        else:  # the text is that of a training example, with its EOS
            assert texts[0].replace(" ", "") == "acatsattastaca</s>" and len(texts) == 2
        assert numbers["texts"][0]["comparisons"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either text or data"),
        ({"text": "a", "data": "b"}, "give either text or data"),
        ({"data": "none.txt"}, "No such file"),
        ({"data": "latin.txt"}, "latin.txt is not UTF-8 at byte 4: save the file as UTF-8"),
        ({"text": "a", "device": "nowhere"}, "nowhere"),
        ({"text": "a", "dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_inspect_needs_texts_and_a_device(files, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    argv = as_arguments({"student": files / "student", "output": tmp_path / "out"} | options)
    assert cli.main(["inspect", *argv]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_texts_beyond_the_positions_of_a_model_are_refused(files, tmp_path, capsys):
    tiny.model("gpt2", layers=2, max_position_embeddings=12).save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    data = ["--data", files / "train.jsonl", "--output", tmp_path / "out"]
    for command in (
        ["inspect", "--student", tmp_path / "short", "--text", "a cat " * 9, *data[2:]],
        ["tune-lens", "--model", tmp_path / "short", "--steps", 1, *data],
        ["cache", "--kind", "topk", "--teacher", tmp_path / "short", *data],
    ):
        assert cli.main([*map(str, command)]) == 1
        assert "but a model has only 12: set a smaller" in capsys.readouterr().err


def test_every_option_of_inspect_reaches_the_function(monkeypatch):
    target = "lens_kernels.hf.inspection.command.inspect_models"
    parameters = signature(inspecting.inspect_models).parameters
    assert INSPECT.keys() == parameters.keys() - {"say"}
    assert all(value != parameters[name].default for name, value in INSPECT.items())
    given = INSPECT | {"output": Path("out")}
    assert received(monkeypatch, target, ["inspect", *as_arguments(INSPECT)]) == given | SAY


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({}, ["--layers", "1:2", "7:3"], r"student layers must lie in \[1, 2\], got 7"),
        ({"teacher": "other"}, [], "different ids for 3 tokens"),
        ({"teacher": "none"}, [], "the tokenizer '.*none' cannot be read"),
    ],
)
def test_inspect_reports_bad_options_and_models(files, tmp_path, capsys, options, more, message):
    assert cli.main(inspection(files, tmp_path / "out", *more, **options)) == 1
    shown = capsys.readouterr().err
    assert re.search(f"^lens-kernels inspect: .*{message}", shown, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_inspect_compares_tokens_below_the_vocabulary_size_and_those_of_the_text(
    files, tmp_path, capsys
):
    more = ("--vocab-size", "60")
    assert cli.main(inspection(files, tmp_path / "out", *more, teacher="other")) == 0
    argv = inspection(files, tmp_path / "out", *more, teacher="other", text="a (b")
    assert cli.main(argv) == 1
    assert "different ids for 1 tokens: '('" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["1", "1:2:3", "a:b", "1:", "1,2"])
def test_layers_option_takes_pairs(files, tmp_path, capsys, pair):
    assert cli.main(inspection(files, tmp_path, "--layers", "1:2", pair)) == 1
    message = f"layers must be pairs of two layers such as 5:8, got '{pair}'"
    assert message in capsys.readouterr().err


def test_required_options_and_full_option_names_are_enforced(files, data, tmp_path, capsys):
    assert "required: --student, --data" in stopped(["eval"], capsys)
    assert "--temp is not an option" in stopped(evaluation(files, data, "--temp", "1"), capsys)
    assert "--max is not an option" in stopped(inspection(files, tmp_path, "--max", "3"), capsys)


@pytest.mark.parametrize("function", [generation.evaluate_model, inspecting.inspect_models])
def test_help_shows_every_description_once(function, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        cli.main([{"evaluate_model": "eval"}.get(function.__name__, "inspect"), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Args:" not in shown and shown.count(function.__doc__.split("\n")[0]) == 1
    texts, parameters = argument_texts(function), signature(function).parameters
    assert texts.keys() == parameters.keys()
    for key in parameters.keys() - {"say"}:
        (line,) = re.findall(rf"^  --{key}[ ,].*\n(?:    .*\n)?", shown, re.MULTILINE)
        assert texts[key] in line


@pytest.mark.parametrize("name", ["eval", "inspect", "train"])
def test_commands_name_a_missing_package_to_install(name, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_prepare", lambda _: __import__("a_module_that_is_missing"))
    assert cli.main([name]) == 1
    expected = (
        f"{name}: the package a_module_that_is_missing is not installed:"
        " pip install a-module-that-is-missing\n"
    )
    assert capsys.readouterr().err == f"lens-kernels {expected}"


@pytest.mark.parametrize("name", failures.LESS)
def test_a_full_memory_names_options_of_the_command(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    options = re.findall(r"--[\w-]+", failures.LESS[name])
    assert options and all(re.search(rf"^  {x}\b", shown, re.MULTILINE) for x in options)


@pytest.mark.parametrize(
    "argv", [[], ["--text", "allow this download"], ["--allow-download"], ["--allow_download", "1"]]
)
def test_the_libraries_are_offline_unless_downloads_are_allowed(monkeypatch, argv):
    said = []
    monkeypatch.setattr(cli, "_prepare", lambda download: said.append(not download))
    with pytest.raises(SystemExit):
        cli.main(["train", *argv])
    assert said == ["--allow" not in " ".join(argv)]
