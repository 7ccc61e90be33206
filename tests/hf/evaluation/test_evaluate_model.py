"""The evaluation of saved models: its scores, and the files that it writes."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest

from lens_kernels.hf.evaluation import generation
from lens_kernels.hf.evaluation.generation import (
    evaluate_model,
    evaluate_rouge,
    held_out_ce,
    table,
)
from lens_kernels.hf.evaluation.sampling import generate
from lens_kernels.hf.training.data import Collator, load_examples, read_rows
from lens_kernels.version import __version__
from tests.support import tiny
from tests.support.commands import write_rows

OPTIONS = {"max_prompt_length": 12, "max_new_tokens": 8, "seeds": (1, 2), "progress": False}


@pytest.fixture
def data(tmp_path):
    prompts = {"say it: ": "a b c", "a prompt that is too long": "a", "more": ["c d", "é"]}
    write_rows(tmp_path / "data", [{"prompt": p, "completion": c} for p, c in prompts.items()])
    return tmp_path / "data"


def test_scores_answers_and_settings_are_returned_and_written(files, data, tmp_path):
    output, saved = tmp_path / "out" / "deep", files / "student"
    result = evaluate_model(saved, data, output=output, max_length=11, batch_size=2, **OPTIONS)
    model, tokenizer = tiny.model(layers=3, seed=1), tiny.tokenizer()
    examples = load_examples(data, tokenizer, max_length=11, max_prompt_length=12, progress=False)
    rouge = evaluate_rouge(model, tokenizer, read_rows(data), no_repeat_ngram_size=6, **OPTIONS)
    ce = held_out_ce(model, examples, Collator(1))
    assert result["cross_entropy"] == pytest.approx(ce)
    assert (result["rouge_l"], result["rouge_l_std"]) == (rouge.mean, rouge.std)
    assert result["rouge_l_by_seed"] == {str(seed): x for seed, x in rouge.scores.items()}
    assert (result["rows"], result["skipped"]) == (2, 1)
    settings = {"max_length": 11, "seeds": [1, 2], "no_repeat_ngram_size": 6}
    assert result["settings"].items() >= settings.items()
    assert result["versions"]["lens-kernels"] == __version__
    assert json.loads((output / "eval.json").read_text()) == result
    lines = (output / "answers.jsonl").read_text("utf-8").splitlines()
    assert "é" in lines[1]
    answers = [json.loads(line) for line in lines]
    assert [(x["line"], x["references"]) for x in answers] == [(1, ["a b c"]), (3, ["c d", "é"])]
    assert answers[0]["answers"] == {str(k): x for k, x in rouge.answers[0]["answers"].items()}

    rounded = evaluate_model(saved, data, max_length=11, dtype="bfloat16", **OPTIONS)
    assert ce != rounded["cross_entropy"] == pytest.approx(ce, rel=0.05)


def test_adapter_answers_alike_before_and_after_merging():
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model, tokenizer = peft.get_peft_model(tiny.model(), config), tiny.tokenizer()
    options = {"seed": 0, "max_new_tokens": 12, "do_sample": False}
    settings = model.generation_config
    settings.repetition_penalty = 9.0
    answer = generate(model, tokenizer, [[5, 6, 7]], **options)
    assert model.get_base_model().generation_config is settings
    assert answer == generate(model.merge_and_unload(), tokenizer, [[5, 6, 7]], **options)
    assert answer != generate(tiny.model(), tokenizer, [[5, 6, 7]], **options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0.0, "temperature"),
        ("top_p", 2.0, "top_p must lie in"),
        ("seeds", (1, 1), "seeds must hold"),
        ("batch_size", 0, "batch_size must be"),
        ("max_length", 0, "max_length must be"),
        ("dtype", "int8", "dtype must be one of"),
        ("device", "nothing", "nothing"),
        ("prompt_style", "poem", "prompt_style must be"),
        ("max_prompt_length", 1, "raise max_prompt_length"),
        ("rouge_tokenizer", "en", "english, unicode"),
        pytest.param("output", __file__, __file__, id="output"),
    ],
)
def test_everything_is_checked_before_the_model_is_loaded(
    files, data, monkeypatch, option, value, message
):
    monkeypatch.setattr(generation, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, RuntimeError, OSError), match=re.escape(message)):
        evaluate_model(files / "student", data, **{**OPTIONS, option: value})


def test_a_full_disk_costs_no_score(files, data, tmp_path, monkeypatch, caplog):
    said, write = [], Path.write_text
    run = lambda: evaluate_model(  # noqa: E731
        files / "student", data, output=tmp_path / "out", say=said.append, **OPTIONS
    )
    result = run()
    expected, said[:] = list(said), []
    assert len(expected) == 3 and expected[-1] == table(result)
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        run()
    assert said == expected and "cannot be written after this seed" in caplog.text
    monkeypatch.setattr(Path, "write_text", write)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result


def test_each_seed_is_saved_as_it_ends(files, data, tmp_path, monkeypatch):
    calls = []

    def stop(*args, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(generation, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(files / "student", data, output=tmp_path, **OPTIONS)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert list(result["rouge_l_by_seed"]) == ["1"] and result["rouge_l_std"] is None
    lines = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert [list(json.loads(x)["answers"]) for x in lines] == [["1"], ["1"]]


@pytest.mark.parametrize("interrupted", [False, True])
def test_frozen_submodules_stay_in_evaluation_mode(monkeypatch, interrupted):
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    example = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    runs = [
        lambda: generate(model, tokenizer, [[5, 6]], seed=0, max_new_tokens=1),
        lambda: held_out_ce(model, [example], Collator(1)),
    ]
    if interrupted:
        monkeypatch.setattr(model.model, "forward", Mock(side_effect=KeyboardInterrupt))
    for run in runs:
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            run()
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("allow", [False, True])
def test_models_are_downloaded_only_if_allowed(data, monkeypatch, allow):
    asked = []
    for name in ("model", "tokenizer"):
        made = getattr(tiny, name)()
        load = lambda *args, made=made: asked.append(args) or made  # noqa: E731
        monkeypatch.setattr(generation, f"load_{name}", load)
    evaluate_model("some/name", data, allow_download=allow, dtype="auto", **OPTIONS)
    assert asked == [("some/name", allow), ("some/name", "auto", allow)]


def test_table_shows_the_scores():
    result = {"cross_entropy": 2.5, "rouge_l": 31.25, "rouge_l_std": 0.5, "rows": 12, "skipped": 3}
    seeds = {"10": 30.75, "20": 31.75}
    shown = table({**result, "rouge_l_by_seed": seeds})
    assert [(line[:30].strip(), line[30:].strip()) for line in shown.split("\n")] == [
        ("cross entropy, nats per token", "2.5000"),
        ("ROUGE-L, mean", "31.2500"),
        ("ROUGE-L, standard deviation", "0.5000"),
        ("ROUGE-L, seed 10", "30.7500"),
        ("ROUGE-L, seed 20", "31.7500"),
        ("rows", "12"),
        ("rows skipped, prompt too long", "3"),
    ]
    one = table({**result, "rouge_l_std": None, "rouge_l_by_seed": {"10": 31.25}})
    assert "deviation" not in one and "seed" not in one
