"""The lens is detected from a model's outputs, and a wrong lens is refused.

Neither detection nor checks change the model.
"""

import dataclasses

import pytest
import torch
from torch import nn

from lens_kernels.hf.model import anatomy
from lens_kernels.hf.model.anatomy import detect_lens, lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.parts import NormFit
from lens_kernels.hf.model.tracing import trace
from lens_kernels.hf.model.verification import check_lens
from tests.coverage import checks, tiny_models
from tests.support import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_norm(lens, **changes):
    return dataclasses.replace(lens, norm_fit=dataclasses.replace(lens.norm_fit, **changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", lambda lens: with_norm(lens, offset=0.0)),
        ("llama", lambda lens: with_norm(lens, offset=1.0)),
        ("llama", lambda lens: with_norm(lens, eps=10 * lens.norm_fit.eps)),
        ("gpt2", lambda lens: with_norm(lens, eps=10 * lens.norm_fit.eps)),
        ("gemma2", lambda lens: with_norm(lens, eps=lens.norm_fit.eps / 10)),
        ("gpt2", lambda lens: with_norm(lens, kind="rms")),
        ("gemma2", lambda lens: dataclasses.replace(lens, softcap=None)),
        ("granite", lambda lens: dataclasses.replace(lens, scale=1 / lens.scale)),
        ("cohere", lambda lens: dataclasses.replace(lens, scale=1 / lens.scale)),
        ("llama", lambda lens: dataclasses.replace(lens, norm="model.layers.3.input_layernorm")),
        ("llama", lambda lens: dataclasses.replace(lens, indices=lens.indices[:-1])),
    ],
    ids=[
        "no-offset",
        "offset",
        "eps",
        "eps-layer",
        "small-eps",
        "kind",
        "no-cap",
        "inverse",
        "inverse-layer",
        "other-norm",
        "other-block",
    ],
)
def test_planted_mistakes_are_refused(kind, change, dtype):
    # A usual eps. The check must find a wrong eps although hidden states are far larger.
    eps = {"gpt2": "layer_norm_epsilon", "cohere": "layer_norm_eps"}.get(kind, "rms_norm_eps")
    model = tiny.model(kind, **{eps: 1e-5}).to(dtype)
    lens = detect_lens(model)
    with torch.no_grad():
        run = trace(model)
        check_lens(lens, run)
        with pytest.raises(ValueError, match="does not reproduce the model's (logits|norm)"):
            check_lens(change(lens), run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_come_from_the_config_where_they_match(dtype):
    cohere = detect_lens(tiny.model("cohere", logit_scale=0.0625).to(dtype))
    granite = detect_lens(tiny.model("granite", logits_scaling=7.3).to(dtype))
    gemma = detect_lens(tiny.model("gemma2", final_logit_softcapping=31.7).to(dtype))
    assert (cohere.scale, granite.scale, gemma.softcap) == (0.0625, 1 / 7.3, 31.7)
    assert gemma.norm_fit == NormFit("rms", tiny.EPS, 1.0)


def test_a_small_cap_does_not_change_the_measured_scale():
    lens = detect_lens(tiny.model("gemma2", final_logit_softcapping=2.0))
    assert (lens.scale, lens.softcap) == (1.0, 2.0)


def test_what_no_config_says_is_measured():
    model = tiny.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: 5 * torch.tanh(0.123 * out / 5))
    found = detect_lens(model)
    assert found.scale == pytest.approx(0.123, rel=1e-4)
    assert found.softcap == pytest.approx(5, rel=1e-4)


def test_a_norm_without_weight_and_a_multiple_of_its_output_are_served():
    model = tiny.model("llama")
    model.model.norm = nn.LayerNorm(16, eps=0.01, elementwise_affine=False)
    model.lm_head.register_forward_pre_hook(lambda module, args: (0.25 * args[0],))
    lens, head = detect_lens(model), lens_head_from(model)
    assert lens.norm_fit == NormFit("layer", 0.01, 0.0) and head.norm.weight is None
    assert head.scale == pytest.approx(0.25, rel=1e-6)


def test_blocks_may_return_lists_and_blocks_that_do_not_run_are_left_out():
    model = tiny.model("llama")
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda *a, forward=forward, **k: [forward(*a, **k), None]
    layers = model.model.layers
    model.model.layers = Unpacking([*layers, *tiny.model("llama").model.layers[:1]])
    lens = detect_lens(model)
    assert lens.indices == (0, 1, 2, 3) and anatomy.blocks_of(model) == list(layers)


class Unpacking(nn.ModuleList):
    """A list of blocks. Its slices wrap each block, so that the block returns only its first
    output."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [First(block) for block in list(self)[index]]
        return super().__getitem__(index)


class First:
    def __init__(self, block):
        self.block = block

    def __call__(self, *args, **kwargs):
        return self.block(*args, **kwargs)[0]


def test_a_float32_residual_stream_in_a_16_bit_model_is_served():
    model = tiny_models.model_of("falcon_mamba", "causal").to(torch.bfloat16)
    assert detect_lens(model).norm == "backbone.norm_f"
    with torch.no_grad():
        states, final = hidden_states(model, [1, 3], {"input_ids": torch.arange(40, 46)[None]})
    assert [x.dtype for x in (*states, final)] == 3 * [torch.float32]


def test_images_of_a_batch_reach_both_models():
    model = tiny_models.model_of("llava", "image-text")
    image = model.config.image_token_id
    ids = torch.tensor([[40, 41, *(16 * [image]), 42, 43, 44]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    checks.check_step(model, {**batch, "pixel_values": torch.randn(1, 3, 32, 32)})


class Transform(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, h):
        return self.norm(nn.functional.gelu(self.dense(h)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: setattr(m.model, "norm", Transform(16)),
            ValueError,
            "has no lens: the head gets the output of 'model.norm.norm', a LayerNorm, whose",
        ),
        (
            lambda m: setattr(m.model, "norm", nn.Tanh()),
            ValueError,
            "final norm, a Tanh, is neither an RMS norm nor a layer norm",
        ),
        (
            lambda m: m.model.norm.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
            ValueError,
            "whose input no block returns",
        ),
        (
            lambda m: m.lm_head.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
            ValueError,
            "not the output of a norm, a block or any other module",
        ),
        (
            lambda m: m.lm_head.register_forward_hook(lambda m, a, out: out.square()),
            ValueError,
            "neither a multiple of the head's products nor",
        ),
        (
            lambda m: m.lm_head.register_forward_hook(lambda m, a, out: out + 1),
            ValueError,
            "neither a multiple of the head's products nor",
        ),
        (lambda m: m.to("meta"), ValueError, "weights on the meta device"),
        (
            lambda m: setattr(m, "get_output_embeddings", lambda: nn.ModuleList([m.lm_head] * 2)),
            TypeError,
            "has 2 heads, and a lens has one",
        ),
        (lambda m: setattr(m, "get_output_embeddings", lambda: None), TypeError, "is a NoneType"),
        (
            lambda m: setattr(m, "get_output_embeddings", lambda: nn.Linear(16, 64)),
            ValueError,
            "calls its head 0 times",
        ),
    ],
    ids=[
        "transform",
        "no-norm",
        "shifted",
        "shifted-head",
        "square",
        "shifted-logits",
        "meta",
        "two-heads",
        "no-head",
        "other-head",
    ],
)
def test_what_is_no_lens_is_refused_with_the_part_and_the_reason(change, error, message):
    model = tiny.model("llama")
    change(model)
    with pytest.raises(error, match=message):
        detect_lens(model)
    assert not any(m._forward_hooks for name, m in model.named_modules() if name != "lm_head")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_before(fails):
    model = tiny.model("gpt2", attn_pdrop=0.5).train()
    model.transformer.h[1].eval()
    model.transformer.h[2].register_forward_hook(lambda module, args, out: out)
    if fails:
        model.lm_head.register_forward_hook(lambda module, args, out: out.square())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    config, random = model.config.to_dict(), torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="has no lens"):
            detect_lens(model)
    else:
        detect_lens(model)
        verify_lens(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_lens_is_found_once_until_a_part_or_the_config_changes(monkeypatch):
    found = []
    find = anatomy.find_lens
    monkeypatch.setattr(anatomy, "find_lens", lambda *a: found.append(1) or find(*a))
    model = tiny.model("granite")
    for _ in range(3):
        assert lens_head_from(model).scale == 1 / 3
    assert len(found) == 1
    model.config.logits_scaling = 4.0
    assert lens_head_from(model).scale == 0.25
    model.model.norm.variance_epsilon = 0.3
    assert lens_head_from(model).norm.eps == 0.3
    del model.model.layers[3]
    model.config.num_hidden_layers = 3
    assert len(anatomy.blocks_of(model)) == 3 and len(found) == 4
    model.config.pad_token_id = 7  # a change that must not cause a new detection
    lens_head_from(model)
    assert len(found) == 4


def test_the_blocks_run_twice_in_a_detection_and_once_in_a_check():
    model, calls = tiny.model("gemma2"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    detect_lens(model)
    assert len(calls) == 2  # the model runs once, and its decoder once alone
    verify_lens(model)
    assert len(calls) == 3


def test_a_caller_under_autocast_changes_nothing():
    model, seen = tiny.model("llama"), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        detect_lens(model)
        verify_lens(model)
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)
