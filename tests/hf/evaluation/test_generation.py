"""Answers that tiny models generate, their ROUGE-L, and the cross entropy on held-out data."""

import statistics
import sys
import warnings

import pytest
import torch

from lens_kernels.hf.evaluation import generation
from lens_kernels.hf.evaluation.generation import (
    evaluate_rouge,
    held_out_ce,
)
from lens_kernels.hf.evaluation.rouge import rouge_l, words
from lens_kernels.hf.evaluation.sampling import generate
from lens_kernels.hf.training.data import Collator, Row, prompt_ids
from tests.support import tiny

# The prompts have three lengths. The padding id, 1, occurs inside one prompt and at the start of
# another.
PROMPTS = [[5, 6, 7], [8, 1, 9, 10, 11, 12, 13], [1, 14], [20, 21, 22]]
MANY = [[i, i + 1] for i in range(5, 25)]


def greedy(model, prompt, count):
    """Return the token ids of the greedy answer, without padding and without a key-value cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == 1:
            break
        ids.append(token)
    return ids[len(prompt) :]


def undecoded():
    """Return a tokenizer whose ``decode`` returns the token ids themselves."""
    tokenizer = tiny.tokenizer()
    tokenizer.decode = lambda ids, skip_special_tokens: ids
    return tokenizer


def test_rouge_l_is_100_times_the_f_measure_of_the_best_reference():
    assert rouge_l(["the cat sat"], [["the cat sat on the mat"]]) == pytest.approx(200 / 3)
    assert rouge_l(["Running"], [["runs"]]) == 100
    assert rouge_l(["a b", "a b"], [["a c"], ["x y", "a b", "x"]]) == pytest.approx(75)


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("été", "été", 100),
        # two of the three words are equal
        ("Été à Paris", "e\u0301te\u0301 à Rome", 200 / 3),
        # In Chinese, each character counts as a word.
        ("猫坐着", "猫坐下", 200 / 3),
        ("हिन्दी में", "हिन्दी में", 100),
        ("ไทย", "ไท", 80),
        ("mot", "été", 0),
    ],
    ids=["equal", "accents", "chinese", "hindi", "thai", "different"],
)
def test_rouge_l_of_text_in_any_script(text, other, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge_l([text], [[other]], "unicode") == pytest.approx(expected)


def test_the_english_tokenizer_warns_of_letters_that_it_loses():
    with pytest.warns(UserWarning, match="1 of 2 rows .* outside ASCII.*use .* 'unicode'"):
        assert rouge_l(["猫", "a"], [["猫"], ["a", "b – c"]]) == 50
    with pytest.raises(ValueError, match="tokenizer must be one of english, unicode, got 'en'"):
        rouge_l(["a"], [["a"]], "en")


def test_words_of_a_text():
    assert words("L'Été, 2 Straße_x; हिन्दी!") == ["l", "été", "2", "strasse", "x", "हिन्दी"]
    assert words("東京tower カメラ ก็") == [*"東京", "tower", *"カメラ", "ก็"]
    assert words("—") == []


@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        (["a", "b"], [["a"]], ValueError, "predictions and references must pair up: got 2 and 1"),
        ([], [], ValueError, "predictions must hold at least one"),
        (["a"], ["a"], TypeError, r"references\[0\] must be a list of texts, got a str"),
        (["a"], [[]], ValueError, r"references\[0\] must hold at least one text"),
    ],
    ids=["lengths", "empty", "text", "no_reference"],
)
def test_rouge_l_refuses_bad_arguments(predictions, references, error, message):
    with pytest.raises(error, match=message):
        rouge_l(predictions, references)


def test_missing_rouge_score_raises_before_generation(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(generation, "generate", lambda *args, **options: pytest.fail("generated"))
    with pytest.raises(RuntimeError, match=r"pip install 'lens-kernels\[train\]'"):
        evaluate_rouge(tiny.model(), tiny.tokenizer(), [row(1)])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_answers_match_unpadded_decoding_in_order(kind, batch_size):
    model, expected = tiny.model(kind), [greedy(tiny.model(kind), x, 12) for x in PROMPTS]
    # ``generate`` must ignore these settings of the model, and must not change them.
    saved = model.generation_config
    saved.repetition_penalty, saved.min_new_tokens = 9.0, 12
    options = {"max_new_tokens": 12, "batch_size": batch_size, "do_sample": False}
    assert generate(model, undecoded(), PROMPTS, seed=0, **options) == expected
    assert len(set(map(tuple, expected))) == len(expected)
    assert model.generation_config is saved


def test_sampled_answers_depend_only_on_seed_and_position():
    model, tokenizer, prompts = tiny.model(), tiny.tokenizer(), [*PROMPTS, PROMPTS[0]]
    options, state = {"max_new_tokens": 12, "temperature": 2.0}, torch.random.get_rng_state()
    answers = generate(model, tokenizer, prompts, seed=3, batch_size=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert generate(model, tokenizer, prompts, seed=3, batch_size=4, **options) == answers
    assert generate(model, tokenizer, prompts[:2], seed=3, **options) == answers[:2]
    assert answers[0] != answers[-1]
    other = generate(model, tokenizer, prompts, seed=4, **options)
    assert all(x != y for x, y in zip(answers, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_k": 20, "top_p": 0.5}])
def test_samples_follow_the_models_distribution(options):
    model, prompt, count = tiny.model(), PROMPTS[1], 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1] / options.get("temperature", 1.0)
    probabilities, ids = logits.softmax(-1).sort(descending=True)
    probabilities[options.get("top_k", len(ids)) :] = 0
    probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum(0) - probabilities >= options.get("top_p", 1.0)] = 0
    probabilities /= probabilities.sum()
    more = {"max_new_tokens": 1, "batch_size": count, **options}
    answers = generate(model, undecoded(), [prompt] * count, seed=0, **more)
    seen = [answers.count([] if token == 1 else [token]) / count for token in ids.tolist()]
    assert sum(seen) == pytest.approx(1) and 1 < (probabilities > 0).sum()
    for found, probability in zip(seen, probabilities.tolist(), strict=True):
        # The allowed error is 4.5 standard deviations of the observed share.
        assert abs(found - probability) <= 4.5 * (probability / count) ** 0.5 + bool(found) / count


@pytest.mark.parametrize("size", [0, 2])
def test_no_repeat_ngram_size_prevents_repeated_ngrams(size):
    options = {"max_new_tokens": 40, "do_sample": False, "no_repeat_ngram_size": size}
    answers = generate(tiny.model(), undecoded(), MANY, seed=0, **options)
    pairs = [[*zip(ids, ids[1:], strict=False)] for ids in answers]
    assert (sum(len(x) - len({*x}) for x in pairs) > 20) == (size == 0)
    assert any(len(x) > len({*x}) for x in pairs) == (size == 0)


def test_answers_end_at_any_eos_of_model_or_tokenizer():
    model, tokenizer = tiny.model(), undecoded()
    answers = ((prompt, greedy(model, prompt, 12)) for prompt in MANY)
    prompt, ids = next((prompt, ids) for prompt, ids in answers if len(set(ids[:5])) == 5)
    options = {"seed": 0, "max_new_tokens": 12, "do_sample": False}
    model.generation_config.eos_token_id = [1, ids[4]]
    assert generate(model, tokenizer, [prompt], **options) == [ids[:4]]
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    assert generate(model, tokenizer, [prompt], **options) == [ids[:2]]


def test_special_tokens_are_left_out_of_answers():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    options = {"seed": 0, "max_new_tokens": 1, "do_sample": False}
    (letter,) = generate(model, tokenizer, PROMPTS[:1], **options)
    assert letter == tokenizer.decode(greedy(model, PROMPTS[0], 1))
    tokenizer.add_special_tokens({"additional_special_tokens": [letter]})
    assert generate(model, tokenizer, PROMPTS[:1], **options) == [""]


def test_evaluation_uses_eval_mode_and_restores_the_models_mode():
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    modes, saved = [], model.generation_config
    model.register_forward_hook(lambda *args: modes.append(model.training))
    held_out_ce(model, [{"input_ids": [5, 6], "labels": [5, 6]}], Collator(1))
    model.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPTS, seed=0, max_new_tokens=2)
    assert modes == [False, False]
    assert model.training and model.generation_config is saved


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("top_k", -1, "top_k must be at least 0, got -1"),
        ("no_repeat_ngram_size", -1, "no_repeat_ngram_size must be at least 0"),
        ("no_repeat_ngram_size", 1, "must be 0 or at least 2, got 1"),
        ("temperature", 0.0, "temperature must .* above 0, got 0.*do_sample=False"),
        ("top_p", 0.0, r"top_p must lie in \(0, 1\], got 0"),
        ("top_p", 1.5, r"top_p must lie in \(0, 1\], got 1.5"),
        pytest.param(
            "max_new_tokens",
            58,
            "64 positions.* 7 tokens .*=58: set max_new_tokens to 57 or",
            id="long",
        ),
        ("prompts", [[5], []], r"prompts\[1\] must hold at least one token"),
    ],
)
def test_generate_refuses_bad_arguments(name, value, message):
    arguments = {"prompts": PROMPTS, "seed": 0, "max_new_tokens": 2, name: value}
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(), tiny.tokenizer(), **arguments)


def row(line, prompt="say it", references=("a b c",)):
    return Row(line=line, references=list(references), prompt=prompt)


ROWS = [row(1), row(3, "much too long " * 3), row(4, "go", ["x y", "q"])]
OPTIONS = {"max_prompt_length": 20, "max_new_tokens": 8}


def test_evaluate_rouge_scores_the_answers_of_each_seed(monkeypatch):
    model, tokenizer, asked = tiny.model(), tiny.tokenizer(), []
    canned = {10: ["a b c", "y"], 20: ["a b", "q"], 30: ["x", "x"]}

    def answer(model, tokenizer, prompts, *, seed, do_sample, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return canned[seed]

    monkeypatch.setattr(generation, "generate", answer)
    result = evaluate_rouge(model, tokenizer, ROWS, seeds=(10, 20, 30), **OPTIONS)
    style = {"prompt_style": "alpaca", "max_prompt_length": 20}
    prompts = [prompt_ids(ROWS[i], tokenizer, **style) for i in (0, 2)]
    assert asked == [(prompts, 8)] * 3
    scores = {10: 500 / 6, 20: 90.0, 30: 100 / 3}
    assert result.scores == pytest.approx(scores)
    assert result.mean == pytest.approx(statistics.mean(scores.values()))
    assert result.std == pytest.approx(statistics.stdev(scores.values()))
    assert (result.rows, result.skipped) == (2, 1)
    answers = {"answers": {10: "y", 20: "q", 30: "x"}, "references": ["x y", "q"], "line": 4}
    assert result.answers[1] == answers | {"prompt": tokenizer.decode(prompts[1])}


def test_greedy_decoding_uses_only_the_first_seed():
    options = {"seeds": (7, 8), "do_sample": False, **OPTIONS}
    result = evaluate_rouge(tiny.model(), tiny.tokenizer(), ROWS, **options)
    assert (result.scores, result.std) == ({7: result.mean}, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seeds", (), r"seeds must hold at least one seed, all different, got \[\]"),
        ("seeds", (1, 2, 1), r"all different, got \[1, 2, 1\]"),
        ("max_prompt_length", 1, "max_prompt_length=1 .* all of the 3 rows are longer"),
    ],
    ids=["no_seed", "equal_seeds", "short_prompts"],
)
def test_evaluate_rouge_refuses_bad_arguments(name, value, message):
    with pytest.raises(ValueError, match=message):
        evaluate_rouge(tiny.model(), tiny.tokenizer(), ROWS, **{**OPTIONS, name: value})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_cross_entropy_is_the_mean_over_labelled_tokens(batch_size):
    model = tiny.model("gpt2")
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [1, 9, 10, 11, 12, 13, 1], "labels": [1, -100, -100, -100, -100, -100, 1]},
        {"input_ids": [20, 21, 22, 23], "labels": [20, 21, 22, 23]},
    ]
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    found = held_out_ce(model, examples, Collator(1), batch_size)
    assert found == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_cross_entropy_of_a_low_precision_model_is_summed_in_float32():
    model, ids = tiny.model().bfloat16(), torch.arange(2, 62)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()}]
    assert held_out_ce(model, examples, Collator(1)) == pytest.approx(expected, rel=1e-5)


def test_held_out_ce_refuses_unlabelled_data_and_a_batch_size_of_0():
    first_only = [
        {"input_ids": [5, 6], "labels": [5, -100]}
        # The only label is on the first token, which no position predicts.
    ]
    with pytest.raises(ValueError, match="examples must hold a label"):
        held_out_ce(tiny.model(), first_only, Collator(1))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        held_out_ce(tiny.model(), first_only, Collator(1), 0)
