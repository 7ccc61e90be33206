"""Lens readings and divergences agree with plain torch. Invalid arguments raise errors."""

import json
import sys

import numpy as np
import pytest
import torch

from lens_kernels.hf import inspect_lens
from lens_kernels.hf.inspection import figures
from lens_kernels.hf.inspection import inspect as inspecting
from lens_kernels.hf.inspection import reading as ins
from lens_kernels.hf.inspection.results import QUANTITIES
from reference.dense import divergence as true_divergence
from tests.support import tiny
from tests.support.inspection import ODD, TEXT, OddTokenizer

STUDENT, TEACHER = {"layers": 3, "seed": 1}, {"layers": 5, "width": 24, "seed": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}


def probabilities(model, ids, depth, lens_norm=True):
    """Return the lens distribution of a Llama at ``depth``, with the model's own norm and head."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        if depth == model.config.get_text_config().num_hidden_layers:
            return out.logits[0].double().softmax(-1)
        hidden = out.hidden_states[depth][0]
        logits = model.lm_head(model.model.norm(hidden) if lens_norm else hidden)
        return logits.double().softmax(-1)


def check_reading(reading, depth, p, ids):
    top = p.topk(reading.top_ids.shape[-1])
    assert reading.top_ids[depth - 1].tolist() == top.indices.tolist()
    torch.testing.assert_close(reading.top_probs[depth - 1], top.values, **CLOSE)
    torch.testing.assert_close(reading.entropy[depth - 1], -(p * p.log()).sum(-1), **CLOSE)
    following = p[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(reading.next_prob[depth - 1], following, **CLOSE)
    rank = (p[:-1] > following[:, None]).sum(-1) + 1
    assert reading.next_rank[depth - 1].tolist() == rank.tolist()


@pytest.fixture
def student():
    return tiny.model(**STUDENT)


@pytest.fixture
def teacher():
    return tiny.model(**TEACHER)


@pytest.mark.parametrize("lens_norm", [True, False])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lens_of_the_last_block_is_the_models_output(kind, lens_norm):
    model = tiny.model(kind)
    check_reading(ins.read(model, TEXT, lens_norm, 5), 4, probabilities(model, TEXT, 4), TEXT)


@pytest.mark.parametrize("lens_norm", [True, False])
def test_lens_of_earlier_blocks_applies_norm_and_head(teacher, lens_norm):
    reading = ins.read(teacher, TEXT, lens_norm, 5)
    assert reading.depths == 5
    output = probabilities(teacher, TEXT, 5)
    for depth in range(1, 5):
        p = probabilities(teacher, TEXT, depth, lens_norm)
        check_reading(reading, depth, p, TEXT)
        truth = true_divergence("forward_kl", output, p, 0.5)
        torch.testing.assert_close(reading.final_kl[depth - 1], truth, **CLOSE)
    assert reading.final_kl[4].abs().max() == 0


def test_read_disables_dropout_and_restores_the_mode():
    model = tiny.model("gpt2", resid_pdrop=0.5)
    expected = ins.read(model, TEXT, True, 3).entropy
    model.train()
    model.transformer.h[0].eval()
    torch.testing.assert_close(ins.read(model, TEXT, True, 3).entropy, expected)
    assert model.training and model.transformer.h[1].training
    assert not model.transformer.h[0].training


def test_read_refuses_models_that_the_lens_does_not_reproduce(student, teacher):
    def squared(module, args, kwargs, out):
        out.logits = out.logits.abs() ** 1.5

    student.model.norm.register_forward_hook(lambda module, args, out: out.square())
    teacher.register_forward_hook(squared, with_kwargs=True)
    for model, reason in ((student, "neither an RMS norm"), (teacher, "neither a multiple of")):
        with pytest.raises(ValueError, match=f"has no lens: .* {reason}"):
            ins.read(model, TEXT, True, 3)


@pytest.mark.parametrize("lens_norm", [True, False])
@pytest.mark.parametrize("name", ["jsd", "forward_kl"])
def test_compare_gives_the_divergences_of_the_lens_distributions(student, teacher, name, lens_norm):
    readings = [ins.read(model, TEXT, lens_norm, 1) for model in (student, teacher)]
    found = ins.compare(*readings, ([1, 2], [1, 3]), name, 0.3)
    shape = [(c.student_depth, c.teacher_depth, c.relative, c.trained) for c in found]
    assert shape[:2] == [(1, 1, False, True), (1, 2, True, False)]
    assert shape[2:] == [(2, 3, True, True), (3, 5, True, False)]
    for c in found:
        q = probabilities(student, TEXT, c.student_depth, lens_norm)
        p = probabilities(teacher, TEXT, c.teacher_depth, lens_norm)
        truth = true_divergence(name, p, q, 0.3)
        torch.testing.assert_close(c.divergence, truth, **CLOSE)
        assert c.mean == pytest.approx(truth.mean().item(), rel=1e-4)
    # The teacher has one block, fewer than the student.
    shallow = ins.read(tiny.model(layers=1), TEXT, lens_norm, 1)
    found = ins.compare(readings[0], shallow)
    assert [(c.student_depth, c.teacher_depth) for c in found] == [(1, 1), (2, 1), (3, 1)]


def test_vocab_size_is_required_if_vocabulary_sizes_differ(student):
    ids, larger = [3, 4, 5], tiny.model(layers=2, vocab=70)
    with pytest.raises(ValueError, match="student_head has 64 .*, teacher_head has 70.*=64"):
        inspect_lens(student, OddTokenizer(), "3 4 5", teacher=larger)
    result = inspect_lens(student, OddTokenizer(), "3 4 5", teacher=larger, vocab_size=64)
    p = probabilities(larger, ids, 2)[:, :64]
    p /= p.sum(-1, keepdim=True)
    check_reading(result.passages[0].readings["teacher"], 2, p, ids)
    truth = true_divergence("jsd", p, probabilities(student, ids, 3), 0.5)
    torch.testing.assert_close(result.compared("student")[-1].divergence, truth, **CLOSE)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("texts", "", ValueError, "text must hold at least one token, got ''"),
        ("texts", ["3", " "], ValueError, "text must hold at least one token, got ' '"),
        ("texts", [], ValueError, "texts must hold at least one text"),
        ("texts", [3], TypeError, "text must be a string or token ids, got int"),
        ("texts", "64", ValueError, "tokenizer gives token 64, but the models share 64 entries"),
        ("max_tokens", 0, ValueError, "max_tokens must be at least 1, got 0"),
        ("top_k", 0, ValueError, "top_k must be at least 1, got 0"),
        ("top_k", True, TypeError, "top_k must be an integer, got bool"),
        ("top_k", 65, ValueError, "top_k must not exceed the 64 entries"),
        ("pairs", ([1], [1, 2]), ValueError, "pairs must be .* two lists of equal length"),
        ("pairs", ([3], [1]), ValueError, r"pairs, student layers must lie in \[1, 2\], got 3"),
        ("pairs", ([1], [0]), ValueError, r"pairs, teacher layers must lie in \[1, 4\], got 0"),
        ("divergence", "kl", ValueError, "divergence='kl' is unknown"),
        ("student", [], ValueError, "student must hold at least one model"),
    ],
)
def test_inspect_refuses_bad_arguments(student, teacher, name, value, error, message):
    given = {"student": student, "texts": "3 4", "teacher": teacher} | {name: value}
    with pytest.raises(error, match=message):
        inspect_lens(tokenizer=OddTokenizer(), **given)


def test_pairs_need_a_teacher(student):
    with pytest.raises(ValueError, match="pairs are layers of student and teacher: give a teacher"):
        inspect_lens(student, OddTokenizer(), "3 4", pairs=([1], [1]))


def test_empty_text_is_refused_even_if_the_tokenizer_adds_bos():
    with pytest.raises(ValueError, match="text must hold at least one token, got ''"):
        inspecting.encode(lambda text: {"input_ids": [0]}, "", 64, 64)


def test_error_without_matplotlib_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'lens-kernels\[train\]'"):
        figures.check_matplotlib()


def test_quartiles_are_over_the_tokens_of_all_texts(student, teacher):
    texts = ["3 4 5", [6, 7], "8"]
    result = inspect_lens([student, teacher], OddTokenizer(), texts, max_tokens=2)
    assert list(result.names) == ["student 1", "student 2"]
    assert [x.total_tokens for x in result.passages] == [3, 2, 1]
    for label, model in (("student 1", student), ("student 2", teacher)):
        alone = [ins.read(model, ids, True, 1) for ids in ([3, 4], [6, 7], [8])]
        for name in QUANTITIES:
            values = torch.cat([getattr(x, name) for x in alone], 1)
            assert values.shape[1] == (5 if name in ("entropy", "final_kl") else 2)
            expected = np.quantile(values.numpy(), [0.25, 0.5, 0.75], axis=1)
            torch.testing.assert_close(
                result.quartiles(label, name), torch.from_numpy(expected), check_dtype=False
            )
    assert not any(x.comparisons or x.readings["student 1"].hidden for x in result.passages)


def test_several_students_are_compared_with_the_teacher(student, teacher):
    texts, options = ["3 4 5", "6 7"], {"teacher": teacher, "pairs": ([1], [2])}
    both = inspect_lens([student, tiny.model(layers=2)], OddTokenizer(), texts, **options)
    alone = inspect_lens(student, OddTokenizer(), texts, **options)
    assert list(both.names) == ["student 1", "student 2", "teacher"]
    for one, other in zip(both.compared("student 1"), alone.compared("student"), strict=True):
        torch.testing.assert_close(one.divergence, other.divergence)
        assert len(one.divergence) == 5
    assert len(both.compared("student 2")) == 2


def test_the_colour_scale_ignores_outliers(student):
    result = inspect_lens(student, OddTokenizer(), [[i] * 9 for i in range(3, 12)])
    entropy = result.values("model", "entropy")
    low, high = result.scale
    assert entropy.min() < low < high < entropy.max()
    heat = result.heat(entropy)
    assert (heat.min(), heat.max()) == (0, 1) and ((heat > 0) & (heat < 1)).float().mean() > 0.85


def test_every_output_says_that_a_long_text_was_cut(student, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda _: {})
    result = inspect_lens(student, OddTokenizer(), "3 4 5", max_tokens=2)
    result.write(tmp_path)
    (passage,) = result.passages
    assert len(passage.tokens) == 2 and passage.total_tokens == 3
    assert "Tokens read: the first 2 of 3." in (tmp_path / "inspect.html").read_text()
    data = json.loads((tmp_path / "data.json").read_text())["texts"][0]
    assert data["total_tokens"] == 3 and len(data["models"]["model"]["entropy"][0]) == 2


def test_token_text_makes_invisible_characters_visible():
    tokenizer = OddTokenizer()
    texts = [inspecting.token_text(tokenizer, i) for i in range(len(ODD))]
    assert texts[:4] == ODD[:4] and texts[4:8] == ["∅", "␣x", "⏎", "\\u0007"]
    tokenizer.convert_ids_to_tokens = lambda token: "▁the"
    # Some tokenizers drop the leading space of a single token when they decode it.
    for decoded in ("the", " the"):
        tokenizer.decode = lambda ids, decoded=decoded: decoded
        assert inspecting.token_text(tokenizer, 3) == "␣the"


def test_model_name_is_its_folder_or_repository(student, tmp_path):
    names = {"": "LlamaForCausalLM", "someone/model": "someone/model", str(tmp_path): tmp_path.name}
    for path, name in names.items():
        student.config.name_or_path = path
        assert inspecting.model_name(student) == name
