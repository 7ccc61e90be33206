"""The lens of every tiny model gives the model's logits. Wrong lenses and families are refused."""

import dataclasses
import sys

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lens_kernels import LensHead
from lens_kernels.hf.model import anatomy as fam
from lens_kernels.hf.model.anatomy import lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import REGISTERED, Family, causal_lm_of, register_family
from tests.support import tiny
from tests.support.compare import assert_close

NAMED = {
    "llama": Family("model.layers", "model.norm", "rms"),
    "granite": Family("model.layers", "model.norm", "rms", logit_divisor="logits_scaling"),
    "cohere": Family("model.layers", "model.norm", "layer", logit_scale="logit_scale"),
    "gemma2": Family(
        "model.layers", "model.norm", "rms", norm_offset=1.0, softcap="final_logit_softcapping"
    ),
    "gemma3": Family(
        "model.language_model.layers", "model.language_model.norm", "rms", norm_offset=1.0
    ),
    "gpt2": Family("transformer.h", "transformer.ln_f", "layer"),
}
IDS = torch.arange(2, 32).view(3, 10)
LORA = peft.LoraConfig


@pytest.fixture
def register():
    """Return a function that registers a changed family until the test ends."""

    def change(kind, **changes):
        register_family(kind, dataclasses.replace(NAMED[kind], **changes))

    yield change
    REGISTERED.clear()


def outputs_of(model):
    """Return the outputs of all blocks, of the final norm, and of the whole model."""
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
    """Check that the lens of the last block gives the model's logits.

    Return the outputs of blocks, final norm and model.
    """
    hidden, final, out = outputs_of(model)
    with torch.no_grad():
        found = read(lens_head_from(model), hidden[-1])
    assert (found - out.logits).abs().max() <= 1e-4 * out.logits.abs().max()
    assert out.logits.abs().max() > 0.1
    verify_lens(model)
    return hidden, final, out


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lens_of_the_last_block_reproduces_the_models_logits(kind):
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
        verify_lens(tiny.model(kind).to(dtype))


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
        ("gemma2", {"softcap": None}),
        # Gemma 3 models ignore the soft cap in their config, so their logits have none.
        ("gemma3", {"softcap": "final_logit_softcapping"}),
        ("gpt2", {"norm_kind": "rms"}),
    ],
    ids=[
        "gemma2-offset",
        "llama-offset",
        "cohere-scale",
        "granite-divisor",
        "granite-scale",
        "gemma2-softcap",
        "gemma3-softcap",
        "gpt2-norm",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_family_is_refused_and_a_right_one_gives_the_detected_lens(
    register, kind, change, dtype
):
    model = tiny.model(kind).to(dtype)
    detected = fam.detect_lens(model)
    register(kind)
    assert fam.detect_lens(model) == detected
    register(kind, **change)
    for function in (lens_head_from, verify_lens):
        with pytest.raises(ValueError, match="does not reproduce the model's logits.*Family"):
            function(model)


def test_verify_lens_accepts_a_small_vocabulary_and_a_zero_head():
    model = tiny.model(vocab=3)  # the check has more tokens than this vocabulary
    verify_lens(model)
    nn.init.zeros_(model.lm_head.weight)
    verify_lens(model)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_padding_row_of_zeros_is_no_difference(kind):
    """New models have a padding row of zeros if their config sets a padding token.

    Configs of gemma2, gemma3 and cohere do so by default.
    """
    model = tiny.model(kind, pad_token_id=0)
    model.get_input_embeddings().weight.data[0] = 0.0
    verify_lens(model)


@pytest.mark.usefixtures("accelerator_state")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_autocast_around_or_inside_the_model_changes_no_verdict(register, kind):
    model = tiny.model(kind)
    detected = fam.detect_lens(model)
    with torch.autocast("cpu", torch.bfloat16):
        verify_lens(model)
        assert fam.detect_lens(tiny.model(kind)) == detected
        assert torch.is_autocast_enabled("cpu")
        # Under autocast, the check would accept an error of 2 % as rounding.
        hook = model.lm_head.register_forward_hook(lambda module, args, output: 1.02 * output)
        with pytest.raises(ValueError, match="does not reproduce the model's logits"):
            verify_lens(model)
        hook.remove()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, None, True)
    verify_lens(prepared)
    fresh = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny.model(kind))
    assert fam.detect_lens(fresh) == detected
    register(kind, norm_offset=0.5)
    with pytest.raises(ValueError, match="does not reproduce"):
        verify_lens(prepared)


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
    verify_lens(model)
    assert outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [30.0, 300.0])
def test_a_cap_far_above_the_logits_at_hand_is_read_and_checked(register, dtype, cap):
    model = tiny.model("gemma2", final_logit_softcapping=cap, initializer_range=0.1).to(dtype)
    assert outputs_of(model)[2].logits.abs().max() < 0.1 * cap
    assert lens_head_from(model).softcap == cap
    register("gemma2", softcap=None)
    with pytest.raises(ValueError, match="does not reproduce the model's logits"):
        verify_lens(model)


def test_verify_lens_changes_neither_the_model_nor_the_random_state():
    model = tiny.model("gpt2", attn_pdrop=0.5).train()
    fam.blocks_of(model)[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verify_lens(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does not reproduce"):
        verify_lens(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(block._forward_hooks for block in fam.blocks_of(model))


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("blocks", 3, TypeError, r"Family\.blocks must be a string, got int"),
        ("norm_kind", "batch", ValueError, r"norm_kind='batch' is unknown; choose 'rms' or"),
        ("norm_offset", "1", TypeError, r"Family\.norm_offset must be a number, got str"),
        *((x, 2.0, TypeError, f"{x} must be a string or None") for x in ("logit_scale", "softcap")),
    ],
)
def test_invalid_families_are_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(NAMED["llama"], **{field: value})
    with pytest.raises(TypeError, match="model_type must be a string, .* got type"):
        register_family(int, NAMED["llama"])
    with pytest.raises(TypeError, match="family must be a Family, got dict"):
        register_family("phi", {"blocks": "model.layers"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": "model.h"}, ValueError, r"no module 'model\.h', as Family\.blocks says"),
        ({"blocks": "model"}, TypeError, r"'model' of Llama.* must be the nn\.ModuleList .*LlamaM"),
        ({"softcap": "cap"}, ValueError, "config of LlamaForCausalLM has no entry 'cap'"),
    ],
    ids=["no_module", "no_list", "no_entry"],
)
def test_a_family_that_does_not_fit_the_model_is_refused(register, change, error, message):
    register("llama", **change)
    with pytest.raises(error, match=message):
        verify_lens(tiny.model())


def test_a_model_without_final_norm_has_a_lens():
    """A model without a final norm has a lens without a norm.

    OPT-350M has no lens: it has no final norm, but it projects hidden states before the head.
    """
    model = tiny.model("opt", do_layer_norm_before=False)
    assert fam.final_norm_of(model) is None and lens_head_from(model).norm is None
    ids = IDS[:, :7]
    with torch.no_grad():
        _, final = hidden_states(model, [1], {"input_ids": ids})
        assert_close(
            lens_head_from(model).logits(final @ model.lm_head.weight.T, 1.0)[0],
            model(ids).logits,
            1e-4,
        )
    model = tiny.model("opt", do_layer_norm_before=False, word_embed_proj_dim=8)
    with pytest.raises(ValueError, match="'model.decoder.project_out', a Linear: a transform bef"):
        lens_head_from(model)


class Packed(torch.Tensor):
    """A subclass of torch.Tensor, as quantization libraries use."""


@pytest.mark.parametrize(
    ("replace", "found"),
    [
        (lambda x: x.to(torch.int8), "torch.int8"),
        (lambda x: x.as_subclass(Packed), "a Packed"),
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
    """A subclass of nn.Linear, as adapter libraries use."""


def parametrized(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("lm_head", lambda x: Adapter(16, 64), "head is a Adapter, not a plain nn.Linear: merge"),
        ("norm", parametrized, "final norm is a .*not a plain norm: merge"),
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
            # Set random weights, because the zeros of a new LoRA adapter have no effect.
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    inner = model.base_model.model
    assert causal_lm_of(model) is inner and causal_lm_of(inner) is inner
    assert fam.blocks_of(model) == fam.blocks_of(inner)
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
    verify_lens(model.merge_and_unload())


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.model(), config)
    for function in (causal_lm_of, fam.blocks_of, lens_head_from, verify_lens):
        with pytest.raises(TypeError, match="'default' of kind PROMPT_TUNING.* such as LoRA"):
            function(model)


def test_verify_lens_does_not_import_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # any import of peft now raises an error
    verify_lens(tiny.model())
