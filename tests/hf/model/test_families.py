"""The lens of every model family reproduces the model's logits. Wrong settings raise an error."""

import dataclasses
import sys

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lens_kernels import LensHead
from lens_kernels.hf.model import families as fam
from lens_kernels.hf.model import verification
from lens_kernels.hf.model.families import Family, lens_head_from, register_family
from tests.support import tiny

KNOWN = """cohere gemma2 gemma3 gemma3_text gpt2 gpt_neox granite llama mistral olmo2 opt phi3
qwen2 qwen3""".split()
IDS = torch.arange(2, 32).view(3, 10)
LORA = peft.LoraConfig


@pytest.fixture
def table(monkeypatch):
    """Return the table of model families, which is restored after the test."""
    monkeypatch.setattr(fam, "FAMILIES", dict(fam.FAMILIES))
    return fam.FAMILIES


def outputs_of(model):
    """Return the outputs of the blocks, of the final norm and of the model."""
    outputs = []
    modules = [*fam.blocks_of(model), fam.final_norm_of(model)]
    hooks = [x.register_forward_hook(lambda m, a, out: outputs.append(out)) for x in modules]
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    *hidden, final = [x[0] if isinstance(x, tuple) else x for x in outputs]
    return hidden, final, out


def read(head: LensHead, h):
    return head.logits(head.norm.forward(h)[0] @ head.weight.T, 1.0)[0]


def assert_reproduced(model):
    """Check that the lens of the last block gives the model's logits, and return all outputs."""
    hidden, final, out = outputs_of(model)
    with torch.no_grad():
        found = read(lens_head_from(model), hidden[-1])
    assert (found - out.logits).abs().max() <= 1e-4 * out.logits.abs().max()
    assert out.logits.abs().max() > 0.1
    verification.verify_lens(model)
    return hidden, final, out


@pytest.mark.parametrize("kind", KNOWN)
def test_lens_of_the_last_block_reproduces_the_models_logits(kind):
    assert sorted(fam.FAMILIES) == KNOWN
    model = tiny.model(kind)
    hidden, final, out = assert_reproduced(model)
    with torch.no_grad():
        decoded = fam.decoder_of(model)(IDS).last_hidden_state
    assert len(hidden) == 4 and len(out.hidden_states) == 5
    for found, state in zip([*hidden[:3], final, decoded], [1, 2, 3, 4, 4], strict=True):
        torch.testing.assert_close(found, out.hidden_states[state])
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(tensor) in own for tensor in lens_head_from(model).tensors().values())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        verification.verify_lens(tiny.model(kind).to(dtype))


def test_lens_head_reads_scale_and_softcap_from_the_current_config():
    granite, gemma = tiny.model("granite"), tiny.model("gemma3_text")
    assert (lens_head_from(granite).scale, lens_head_from(gemma).softcap) == (1 / 3, 6.0)
    granite.config.logits_scaling, gemma.config.final_logit_softcapping = 4.0, None
    assert (lens_head_from(granite).scale, lens_head_from(gemma).softcap) == (0.25, None)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"norm_offset": 0.0}),
        ("llama", {"norm_offset": 1.0}),
        ("cohere", {"logit_scale": None}),
        ("granite", {"logit_divisor": None}),
        ("granite", {"logit_divisor": None, "logit_scale": "logits_scaling"}),
        ("gemma3_text", {"softcap": None}),
        ("gemma3", {"softcap": "final_logit_softcapping"}),  # Gemma 3 ignores it
        ("gpt2", {"norm_kind": "rms"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_lens_refuses_a_wrong_family(table, kind, change, dtype):
    model = tiny.model(kind).to(dtype)
    verification.verify_lens(model)
    table[kind] = dataclasses.replace(table[kind], **change)
    with pytest.raises(ValueError, match="does not reproduce the model's logits.*Family"):
        verification.verify_lens(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verify_lens_refuses_a_wrong_eps_even_for_large_hidden_states(monkeypatch, kind, dtype):
    model = tiny.model(kind).to(dtype)
    norm = fam.final_norm_of(model)
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    setattr(norm, name, 1e-5)
    verification.verify_lens(model)
    right = lens_head_from(model)
    wrong = dataclasses.replace(right, norm=dataclasses.replace(right.norm, eps=1e-6))
    monkeypatch.setattr(verification, "lens_head_from", lambda model: wrong)
    with pytest.raises(ValueError, match="does not reproduce the model's norm"):
        verification.verify_lens(model)


def test_verify_lens_accepts_a_small_vocabulary_and_a_zero_head():
    # The text of the check has more tokens than this vocabulary.
    model = tiny.model(vocab=3)
    verification.verify_lens(model)
    nn.init.zeros_(model.lm_head.weight)
    verification.verify_lens(model)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_padding_row_of_zeros_is_no_difference(kind):
    """An embedding of zeros passes the check.

    New models have one for the padding token; gemma2, gemma3 and cohere have it by default.
    """
    model = tiny.model(kind, pad_token_id=0)
    model.get_input_embeddings().weight.data[0] = 0.0
    verification.verify_lens(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
@pytest.mark.usefixtures("accelerator_state")
def test_autocast_around_or_inside_the_model_changes_no_verdict(table, kind):
    model = tiny.model(kind)
    with torch.autocast("cpu", torch.bfloat16):
        verification.verify_lens(model)
        assert torch.is_autocast_enabled("cpu")
        # An error of 2 % would pass as rounding if the check ran under autocast.
        hook = model.lm_head.register_forward_hook(lambda module, args, output: 1.02 * output)
        with pytest.raises(ValueError, match="does not reproduce the model's logits"):
            verification.verify_lens(model)
        hook.remove()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, None, True)
    verification.verify_lens(prepared)
    table[model.config.model_type] = dataclasses.replace(table[kind], norm_offset=0.5)
    with pytest.raises(ValueError, match="does not reproduce"):
        verification.verify_lens(prepared)


def test_float32_logits_of_a_16_bit_model_are_rounded_all_the_same():
    model = tiny.model(width=64).to(torch.bfloat16)
    forward = model.forward
    outputs = []

    def upcast(*args, **options):
        out = forward(*args, **options)
        out.logits = out.logits.float()
        outputs.append(out)
        return out

    model.forward = upcast
    verification.verify_lens(model)
    assert outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [30.0, 300.0])
def test_a_softcap_far_above_the_logits_is_checked(table, dtype, cap):
    model = tiny.model("gemma2", final_logit_softcapping=cap, initializer_range=0.1).to(dtype)
    assert outputs_of(model)[2].logits.abs().max() < 0.1 * cap
    verification.verify_lens(model)
    table["gemma2"] = dataclasses.replace(table["gemma2"], softcap=None)
    with pytest.raises(ValueError, match="does not reproduce the model's logits"):
        verification.verify_lens(model)


def test_verify_lens_changes_neither_the_model_nor_the_random_state():
    model = tiny.model("gpt2", attn_pdrop=0.5).train()
    fam.blocks_of(model)[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verification.verify_lens(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does not reproduce"):
        verification.verify_lens(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(block._forward_hooks for block in fam.blocks_of(model))


def test_verify_lens_head_refuses_logits_that_the_lens_does_not_reproduce():
    model = tiny.model()
    hidden, _, out = outputs_of(model)
    head = lens_head_from(model)
    verification.verify_lens_head(model, head, hidden[-1], out.logits)
    for wrong in (1.01 * out.logits, out.logits * float("nan"), 0 * out.logits):
        with pytest.raises(ValueError, match="LlamaForCausalLM does not reproduce"):
            verification.verify_lens_head(model, head, hidden[-1], wrong)


def test_register_family_adds_an_architecture(table):
    """A registered family adds an architecture, here Phi, whose head has a bias."""
    model = tiny.model("phi")
    with pytest.raises(ValueError, match=r"'phi' is not known .*llama.*register_family.*LensHead"):
        lens_head_from(model)
    register_family("phi", Family("model.layers", "model.final_layernorm", "layer"))
    assert lens_head_from(model).bias is model.lm_head.bias
    assert_reproduced(model)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("blocks", 3, TypeError, r"Family\.blocks must be a string, got int"),
        ("norm_kind", "batch", ValueError, r"norm_kind='batch' is unknown; choose 'rms' or"),
        ("norm_offset", "1", TypeError, r"Family\.norm_offset must be a number, got str"),
        *((x, 2.0, TypeError, f"{x} must be a string or None") for x in ("logit_scale", "softcap")),
    ],
)
def test_invalid_families_are_refused(table, field, value, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(table["llama"], **{field: value})
    with pytest.raises(TypeError, match="model_type must be a string, .* got type"):
        register_family(int, table["llama"])
    with pytest.raises(TypeError, match="family must be a Family, got dict"):
        register_family("phi", {"blocks": "model.layers"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": "model.h"}, ValueError, r"no module 'model\.h', as Family\.blocks says"),
        ({"blocks": "model"}, TypeError, r"'model' of Llama.* must be the nn\.ModuleList .*LlamaM"),
        ({"softcap": "cap"}, ValueError, "config of LlamaForCausalLM has no entry 'cap'"),
    ],
    ids=str,
)
def test_a_family_that_does_not_fit_the_model_is_refused(table, change, error, message):
    table["llama"] = dataclasses.replace(table["llama"], **change)
    with pytest.raises(error, match=message):
        verification.verify_lens(tiny.model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_layer_norm_before": False}, "OPTForCausalLM has no module .*no final norm"),
        (
            {"word_embed_proj_dim": 8},
            "has width 16, its head 8: .* projection.*word_embed_proj",
        ),
    ],
)
def test_opt_variants_without_a_lens_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lens_head_from(tiny.model("opt", **options))


class Packed(torch.Tensor):
    """A tensor subclass, as in quantization libraries."""


@pytest.mark.parametrize(
    ("replace", "found"),
    [
        (lambda x: x.to(torch.int8), "torch.int8"),
        (lambda x: x.as_subclass(Packed), "a Packed"),
        (lambda x: x.to_sparse(), "sparse_coo"),
    ],
)
@pytest.mark.parametrize("part", ["head", "final norm"])
def test_lens_head_from_refuses_weights_that_are_not_dense_floats(part, replace, found):
    model = tiny.model()
    module = model.lm_head if part == "head" else model.model.norm
    weight = replace(module.weight.data)
    module.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    with pytest.raises(TypeError, match=f"weight of the model's {part} must be a dense.*{found}"):
        lens_head_from(model)


class Adapter(nn.Linear):
    """A subclass of nn.Linear, as in adapter libraries."""


def parametrized(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


def without_eps(norm):
    del norm.variance_epsilon
    return norm


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("lm_head", lambda x: Adapter(16, 64), "head is a Adapter, not a plain nn.Linear: merge"),
        ("norm", parametrized, "final norm is a .*not a plain norm with a weight: merge"),
        ("norm", lambda x: nn.LayerNorm(16, elementwise_affine=False), "LayerNorm, not a plain"),
        ("norm", without_eps, "LlamaRMSNorm, has neither variance_epsilon nor eps"),
    ],
)
def test_lens_head_from_refuses_modified_modules(part, change, message):
    model = tiny.model()
    owner = model if part == "lm_head" else model.model
    setattr(owner, part, change(getattr(owner, part)))
    with pytest.raises(TypeError, match=message):
        lens_head_from(model)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_lens_reproduces_a_peft_model(kind, mixed):
    plain = outputs_of(tiny.model(kind))[2].logits
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    model = peft.get_peft_model(tiny.model(kind), config, mixed=mixed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # LoRA weights start at zero, where an adapter has no effect.
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    inner = model.base_model.model
    assert fam.causal_lm_of(model) is inner and fam.causal_lm_of(inner) is inner
    assert fam.blocks_of(model) is fam.blocks_of(inner)
    assert fam.decoder_of(model) is fam.decoder_of(inner)
    _, _, out = assert_reproduced(model)
    assert (out.logits - plain).abs().max() > 0.01 * plain.abs().max()
    assert lens_head_from(model).weight is inner.lm_head.weight


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (LORA(target_modules=["lm_head"]), "head is a Linear"),
        (LORA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "head is a ModulesToSave"),
        (LORA(target_modules=["q_proj"], modules_to_save=["norm"]), "norm is a ModulesToSave"),
        (peft.LNTuningConfig(target_modules=["norm"]), "norm is a LNTuningLayer"),
    ],
    ids=["LoRA of the head", "saved head", "saved norm", "tuned norm"],
)
def test_an_adapter_on_head_or_norm_is_refused_until_it_is_merged(config, part):
    model = peft.get_peft_model(tiny.model(), config)
    with pytest.raises(TypeError, match=f"{part}.*merge_and_unload.*modules_to_save"):
        lens_head_from(model)
    verification.verify_lens(model.merge_and_unload())


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.model(), config)
    for function in (fam.causal_lm_of, fam.blocks_of, lens_head_from, verification.verify_lens):
        with pytest.raises(TypeError, match="'default' of kind PROMPT_TUNING.* such as LoRA"):
            function(model)


def test_verify_lens_does_not_import_peft(monkeypatch):
    # With this entry, an import of peft raises an error.
    monkeypatch.setitem(sys.modules, "peft", None)
    verification.verify_lens(tiny.model())
