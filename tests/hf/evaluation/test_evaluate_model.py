"""Evaluation of saved models: scores and files."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import tiny

pytest.importorskip("transformers")
pytest.importorskip("rouge_score")
from lens_kernels.hf.evaluation import generation  # noqa: E402
from lens_kernels.hf.evaluation.generation import (  # noqa: E402
    evaluate_model,
    evaluate_rouge,
    held_out_ce,
    table,
)
from lens_kernels.hf.evaluation.sampling import generate  # noqa: E402
from lens_kernels.hf.training.data import Collator, load_examples, read_rows  # noqa: E402
from lens_kernels.version import __version__  # noqa: E402

pytestmark = pytest.mark.hf

OPTIONS = {"max_prompt_length": 12, "max_new_tokens": 8, "seeds": (1, 2), "progress": False}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": "say it: ", "completion": "a b c"},
        {"prompt": "a prompt that is too long", "completion": "a"},
        {"prompt": "more", "completion": ["c d", "é"]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapter(saved, folder):
    """Save a random adapter of the model in ``saved``; return the model with it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config)
    model.save_pretrained(folder)
    return model


def test_scores_answers_and_settings_are_returned_and_written(saved, data, tmp_path):
    output = tmp_path / "out" / "deep"
    result = evaluate_model(saved, data, output=output, max_length=11, batch_size=2, **OPTIONS)
    model, tokenizer = tiny.model(), tiny.tokenizer()
    examples = load_examples(data, tokenizer, max_length=11, max_prompt_length=12, progress=False)
    rouge = evaluate_rouge(model, tokenizer, read_rows(data), no_repeat_ngram_size=6, **OPTIONS)
    assert result["cross_entropy"] == pytest.approx(held_out_ce(model, examples, Collator(1)))
    assert result["rouge_l"] == rouge.mean
    assert result["rouge_l_std"] == rouge.std
    assert result["rouge_l_by_seed"] == {str(seed): x for seed, x in rouge.scores.items()}
    assert (result["rows"], result["skipped"]) == (2, 1)
    assert result["settings"]["max_length"] == 11
    assert result["settings"]["seeds"] == [1, 2]
    assert result["settings"]["no_repeat_ngram_size"] == 6
    assert result["versions"]["lens-kernels"] == __version__
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    assert json.loads((output / "eval.json").read_text()) == result
    lines = (output / "answers.jsonl").read_text("utf-8").splitlines()
    assert "é" in lines[1]
    answers = [json.loads(line) for line in lines]
    assert [x["line"] for x in answers] == [1, 3]
    assert [x["references"] for x in answers] == [["a b c"], ["c d", "é"]]
    assert answers[0]["answers"] == {str(k): x for k, x in rouge.answers[0]["answers"].items()}


def test_a_model_with_an_adapter_answers_as_the_merged_one(saved, tmp_path):
    model, tokenizer = adapter(saved, tmp_path / "adapter"), tiny.tokenizer()
    options = {"seed": 0, "max_new_tokens": 12, "do_sample": False}
    config = model.generation_config
    config.repetition_penalty = 9.0
    answer = generate(model, tokenizer, [[5, 6, 7]], **options)
    assert model.get_base_model().generation_config is config
    assert answer == generate(model.merge_and_unload(), tokenizer, [[5, 6, 7]], **options)
    assert answer != generate(tiny.model(), tokenizer, [[5, 6, 7]], **options)


@pytest.mark.parametrize("allow", [False, True])
def test_the_hub_is_asked_only_if_allowed(data, monkeypatch, allow):
    asked = []
    model = tiny.model()
    monkeypatch.setattr(
        generation, "load_tokenizer", lambda *args: asked.append(args) or tiny.tokenizer()
    )
    monkeypatch.setattr(generation, "load_model", lambda *args: asked.append(args) or model)
    evaluate_model("some/name", data, allow_download=allow, dtype="auto", **OPTIONS)
    assert asked == [("some/name", allow), ("some/name", "auto", allow)]


def test_the_weights_get_the_dtype_asked_for(saved, data):
    exact, rounded = (
        evaluate_model(saved, data, dtype=dtype, **OPTIONS)["cross_entropy"]
        for dtype in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)


def test_table_shows_the_scores():
    result = {
        "cross_entropy": 2.5,
        "rouge_l": 31.25,
        "rouge_l_std": 0.5,
        "rouge_l_by_seed": {"10": 30.75, "20": 31.75},
        "rows": 12,
        "skipped": 3,
    }
    assert table(result).split("\n") == [
        "cross entropy, nats per token      2.5000",
        "ROUGE-L, mean                     31.2500",
        "ROUGE-L, standard deviation        0.5000",
        "ROUGE-L, seed 10                  30.7500",
        "ROUGE-L, seed 20                  31.7500",
        "rows                              12",
        "rows skipped, prompt too long      3",
    ]
    one = table({**result, "rouge_l_std": None, "rouge_l_by_seed": {"10": 31.25}})
    assert "deviation" not in one and "seed" not in one
