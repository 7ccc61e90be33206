"""Packed rows: no example affects another, and training equals training without packing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from lens_kernels.hf import LensObjective
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.training.collation import Collator, example_numbers, first_rows, tokens_in
from lens_kernels.hf.training.packing import Packed, check_packing, packed_rows
from tests.support import tiny
from tests.support.training import (
    STUDENT,
    TEACHER,
    assert_same_step,
    logged,
    make_trainer,
    tokens,
    trained,
    weights,
)

START = tiny.model(**STUDENT).state_dict()
SIZES = (4, 10, 3, 7, 2, 9, 5, 3)


def examples(vocab=64):
    """Return examples of different sizes. All tokens but the second have a label."""
    rows = [x[:size].clone() for x, size in zip(tokens(vocab=vocab), SIZES, strict=True)]
    return [{"input_ids": x, "labels": x.where(torch.arange(len(x)) != 1, -100)} for x in rows]


def test_rows_are_filled_and_no_example_is_lost(monkeypatch):
    sizes = [3, 8, 5, 2, 6, 4, 4]
    rows = list(packed_rows(enumerate(sizes), 8))
    assert sorted(i for row in rows for i in row) == [*range(7)]
    # The example of 2 tokens is packed with the example of 6 tokens, although another row is
    # emptier.
    assert sorted(sorted(sizes[i] for i in row) for row in rows) == [[2, 6], [3, 5], [4, 4], [8]]
    # If at most two rows may be unfinished, the fullest row is yielded when a third row is needed.
    monkeypatch.setattr("lens_kernels.hf.training.packing.OPEN_ROWS", 2)
    assert list(packed_rows(enumerate([5, 6, 7, 1]), 8)) == [[1], [2, 3], [0]]
    with pytest.raises(ValueError, match="an example has 9 tokens, but packed rows have max_len"):
        list(packed_rows([(0, 9)], 8))


def test_a_packed_batch_has_restarting_positions_and_no_label_from_another_example():
    parts = examples()
    batch = Collator(1)([[parts[0], parts[2]], [parts[4]]])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    ids = batch["input_ids"]
    kept = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0] * 7]).bool()
    assert batch["labels"].tolist() == ids.where(kept, -100).tolist()
    assert tokens_in(batch) == 4 + 3 + 2
    row = Collator(1, one_row=True)([[parts[0], parts[2]], [parts[4]]])
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert tokens_in(row) == 9


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_packed_losses_and_gradients_equal_those_of_padded_batches(kind, one_row):
    student = tiny.model(kind, layers=3, seed=1, initializer_range=0.2)
    teacher = tiny.model(kind, layers=4, width=24, seed=2, initializer_range=0.2)
    objective = LensObjective.from_models(student, teacher, 2, kd_ratio=0.5)
    found = []
    packed = Packed(examples(), 12)
    assert len(packed) < 6
    for batch in (
        Collator(1)(examples()),
        Collator(1, one_row=one_row)([packed[i] for i in range(len(packed))]),
    ):
        student.zero_grad()
        outcome = objective(batch)
        outcome.loss.backward()
        grads = {name: x.grad for name, x in student.named_parameters() if x.grad is not None}
        found.append((outcome, copy.deepcopy(grads)))
    (plain, expected), (outcome, grads) = found
    assert outcome.num_tokens == plain.num_tokens == sum(SIZES) - 2 * len(SIZES)
    for name in ("loss", "ce", "kd", "lens", "lens_1"):
        assert outcome.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-5), name
    for name, x in expected.items():
        assert (grads[name] - x).norm() <= 1e-5 * x.norm() + 1e-7, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_sees_no_other_example_of_its_row(attention):
    model = tiny.model("qwen2", attn_implementation=attention)
    parts = examples()
    batch = Collator(1)([[parts[0], parts[1], parts[2]]])
    del batch["labels"]
    embedded = model.get_input_embeddings()
    seen = []
    for place in range(17):
        with torch.enable_grad():
            handle = embedded.register_forward_hook(lambda _, __, out: seen.append(out) or out)
            final = hidden_states(model, [], batch)[1]
            handle.remove()
        (grad,) = torch.autograd.grad(final[0, place].sum(), seen.pop())
        (reached,) = grad[0].abs().sum(-1).nonzero(as_tuple=True)
        start = max(x for x in (0, 4, 14) if x <= place)
        assert reached.tolist() == [*range(start, place + 1)], place


def test_the_first_rows_of_a_packed_batch_keep_the_numbers_of_all_their_examples():
    """An epoch's last batch may be filled with repeated rows, which are cut."""
    ids = [{"input_ids": [3, 4], "labels": [3, 4], "example_id": i} for i in range(3)]
    batch = Collator(0)([ids[:2], ids[2:]])
    assert example_numbers(batch["example_id"]) == [0, 1, 2]
    assert example_numbers(first_rows(batch, 1)["example_id"]) == [0, 1]


@pytest.mark.parametrize("options", [{}, {"teacher_cache": "cache"}, {"mse_coeff": 0.02}])
def test_packed_steps_equal_padded_steps(tmp_path, options):
    options = {**options, "kd_ratio": 0.5, "data": examples(), "max_steps": 1}
    plain = trained(tmp_path / "a", batch=8, **{**options, "teacher_cache": None})
    if "teacher_cache" in options:
        options["teacher_cache"] = str(tmp_path / "cache")
    options |= {"packing": True, "max_length": 12}
    rows = len(make_trainer(tmp_path, **options).train_dataset)
    assert rows == 4
    packed = trained(tmp_path / "b", batch=3, accumulate=2, **options)
    assert_same_step(START, weights(plain), weights(packed))
    for key in ("loss", "ce", "kd", "lens_1"):
        assert logged(packed, key) == pytest.approx(logged(plain, key), rel=1e-5), key


def test_packed_fine_tuning_equals_padded_fine_tuning(tmp_path):
    options = {"kd_ratio": 0.0, "teacher": False, "data": examples(), "max_steps": 1}
    plain = trained(tmp_path / "a", batch=8, **options)
    packed = trained(tmp_path / "b", batch=4, packing=True, max_length=12, **options)
    assert_same_step(START, weights(plain), weights(packed))


def mamba():
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_mix_the_examples_of_a_row_are_refused(kind):
    torch.manual_seed(0)
    if kind == "mamba":
        model = mamba()
    else:
        config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="(?i)packing=True needs .* the teacher, a (mamba|bloom)"):
        check_packing("teacher", model, Collator(1))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("attention_mask", [1, 1, 1, 0], "an attention_mask holds 0"),
        ("position_ids", [0, 1, 2, 3], "packing=True sets position_ids"),
    ],
)
def test_columns_that_packing_would_replace_are_refused(tmp_path, column, value, message):
    data = [{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5], column: value}]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data=data, packing=True)
    with pytest.raises(ValueError, match="an example has 4 tokens.* max_length=3"):
        make_trainer(
            tmp_path,
            data=[{k: data[0][k] for k in ("input_ids", "labels")}],
            packing=True,
            max_length=3,
        )


def attended(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    """Return the causal attention of heads ``(..., tokens, heads, width)``, as flash-attn does."""
    assert causal and window_size == (-1, -1)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(-3, -2)


@pytest.fixture
def segments(monkeypatch):
    """Replace the functions of flash-attn, which needs a GPU. Return the lengths they were given.

    transformers' own code still computes the lengths from the batch.
    """
    found = []

    def attended_by_segment(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how):
        sizes = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() and sum(sizes) == len(q)
        assert max_seqlen_q == max_seqlen_k == max(sizes)
        found.append(sizes)
        how = {x: how[x] for x in ("softmax_scale", "causal", "window_size") if x in how}
        parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([attended(*part, **how) for part in parts])

    utils = modeling_flash_attention_utils
    cached = [None] * hasattr(utils, "_flash_with_kvcache_fn")  # absent before transformers 5
    functions = (attended, attended_by_segment, *cached, utils._pad_input, utils._unpad_input)
    for name in ("_loaded_implementation", "_flash_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None, raising=False)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    return found


def test_flash_attention_separates_the_examples_of_packed_batches(tmp_path, segments):
    sizes = {"student": STUDENT, "teacher": TEACHER}
    models = {name: tiny.model(**x, initializer_range=0.2) for name, x in sizes.items()}
    start = copy.deepcopy(models["student"].state_dict())
    options = {"data": examples(), "kd_ratio": 0.5, "max_steps": 1}
    plain = trained(tmp_path / "a", batch=8, **copy.deepcopy(models), **options)
    for model in models.values():
        model.config._attn_implementation = "flash_attention_2"
    trainer = make_trainer(
        tmp_path / "b", batch=2, accumulate=2, packing=True, max_length=12, **models, **options
    )
    assert trainer.data_collator.one_row
    segments.clear()
    trainer.train()
    # Each block of student and teacher got the length of every example, and no padding.
    assert sorted(size for sizes in segments for size in sizes) == sorted(SIZES * 7)
    assert_same_step(start, weights(plain), weights(trainer))
    for key in ("loss", "ce", "kd", "lens_1"):
        assert logged(trainer, key) == pytest.approx(logged(plain, key), rel=1e-5), key
