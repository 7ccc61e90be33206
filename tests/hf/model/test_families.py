"""Every family's lens is the model's own output, a wrong one is refused, and blocks are copied."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

from lens_kernels import LensHead
from tests.support import tiny

pytest.importorskip("transformers")
from lens_kernels.hf.model import families as fam  # noqa: E402
from lens_kernels.hf.model import verification  # noqa: E402
from lens_kernels.hf.model.families import Family, lens_head_from, register_family  # noqa: E402

pytestmark = pytest.mark.hf
KNOWN = sorted(fam.FAMILIES)
EXPECTED = """cohere gemma2 gemma3 gemma3_text gpt2 gpt_neox granite llama mistral olmo2 opt phi3
qwen2 qwen3"""


@pytest.fixture
def table(monkeypatch):
    """The table of families, put back after the test."""
    monkeypatch.setattr(fam, "FAMILIES", dict(fam.FAMILIES))
    return fam.FAMILIES


def tokens(batch=3, length=10, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (batch, length), generator=generator)


def run(model, ids=None):
    """Return the outputs of all blocks, of the final norm, and of the model."""
    hidden, final = [], []
    hooks = [
        block.register_forward_hook(lambda module, args, output: hidden.append(output))
        for block in fam.blocks_of(model)
    ]
    norm = fam.final_norm_of(model)
    hooks.append(norm.register_forward_hook(lambda module, args, output: final.append(output)))
    with torch.no_grad():
        out = model(tokens() if ids is None else ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    hidden = [x[0] if isinstance(x, tuple) else x for x in hidden]
    return hidden, final[0], out


def read(head: LensHead, h):
    return head.logits(head.norm.forward(h)[0] @ head.weight.T, 1.0)[0]


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.abs().max() > 0.1


def test_the_known_families():
    assert KNOWN == EXPECTED.split()


@pytest.mark.parametrize("kind", KNOWN)
def test_last_block_read_through_the_lens_is_the_models_own_output(kind):
    model = tiny.model(kind)
    hidden, final, out = run(model)
    with torch.no_grad():
        assert_same(read(lens_head_from(model), hidden[-1]), out.logits)
        decoded = fam.decoder_of(model)(tokens()).last_hidden_state
    assert len(hidden) == 4 and len(out.hidden_states) == 5
    for depth in (1, 2, 3):
        torch.testing.assert_close(hidden[depth - 1], out.hidden_states[depth])
    torch.testing.assert_close(final, out.hidden_states[-1])
    torch.testing.assert_close(decoded, final)
    verification.verify_lens(model)


@pytest.mark.parametrize("kind", KNOWN)
def test_the_lens_shares_the_models_parameters(kind):
    model = tiny.model(kind)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(tensor) in own for tensor in lens_head_from(model).tensors().values())


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        ("cohere", "logit_scale", 0.7, {"scale": 0.7}),
        ("granite", "logits_scaling", 4.0, {"scale": 0.25}),
        ("gemma2", "final_logit_softcapping", 9.0, {"softcap": 9.0}),
        ("gemma3_text", "final_logit_softcapping", None, {"softcap": None}),
    ],
)
def test_scale_and_cap_are_the_configs_at_the_time_of_the_call(kind, name, value, expected):
    model = tiny.model(kind)
    before = lens_head_from(model)
    setattr(model.config, name, value)
    after = lens_head_from(model)
    for field, number in expected.items():
        assert getattr(after, field) == number != getattr(before, field)


WRONG = {
    "offset": ("gemma2", {"norm_offset": 0.0}),
    "offset_of_another": ("llama", {"norm_offset": 1.0}),
    "scale": ("cohere", {"logit_scale": None}),
    "divisor": ("granite", {"logit_divisor": None}),
    "divisor_for_scale": (
        "granite",
        {"logit_divisor": None, "logit_scale": "logits_scaling"},
    ),
    "cap": ("gemma3_text", {"softcap": None}),
    "cap_that_is_not_applied": ("gemma3", {"softcap": "final_logit_softcapping"}),
    "kind": ("gpt2", {"norm_kind": "rms"}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_description_is_refused(table, case, dtype):
    kind, change = WRONG[case]
    model = tiny.model(kind).to(dtype)
    verification.verify_lens(model)
    table[kind] = dataclasses.replace(table[kind], **change)
    with pytest.raises(ValueError, match="does not reproduce the model's logits.*Family"):
        verification.verify_lens(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_eps_is_refused_even_where_hidden_states_are_large(monkeypatch, kind, dtype):
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


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_verification_of_other_dtypes(kind, dtype):
    verification.verify_lens(tiny.model(kind).to(dtype))


def test_verification_of_a_vocabulary_smaller_than_its_tokens():
    verification.verify_lens(tiny.model(vocab=3))


def test_verification_of_a_head_that_starts_at_zero():
    model = tiny.model()
    nn.init.zeros_(model.lm_head.weight)
    verification.verify_lens(model)


def test_verification_leaves_the_model_and_the_random_state_as_they_were():
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


def test_a_lens_that_does_not_reproduce_the_logits_is_refused():
    model = tiny.model()
    hidden, _, out = run(model)
    head = lens_head_from(model)
    verification.verify_lens_head(model, head, hidden[-1], out.logits)
    for wrong in (1.01 * out.logits, out.logits * float("nan"), 0 * out.logits):
        with pytest.raises(ValueError, match="LlamaForCausalLM does not reproduce"):
            verification.verify_lens_head(model, head, hidden[-1], wrong)


def phi():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.PhiConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=1,
    )
    model = hf.PhiForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5)
    return model.eval()


def test_a_family_can_be_registered(table):
    """Phi's head has a bias."""
    model = phi()
    with pytest.raises(ValueError, match=r"'phi' is not known .*llama.*register_family.*LensHead"):
        lens_head_from(model)
    register_family("phi", Family("model.layers", "model.final_layernorm", "layer"))
    verification.verify_lens(model)
    hidden, _, out = run(model)
    with torch.no_grad():
        assert_same(read(lens_head_from(model), hidden[-1]), out.logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": 3}, TypeError, r"Family\.blocks must be a string, got int"),
        ({"norm": None}, TypeError, r"Family\.norm must be a string, got NoneType"),
        ({"norm_kind": "batch"}, ValueError, r"norm_kind='batch' is unknown; choose 'rms' or"),
        ({"norm_offset": "1"}, TypeError, r"Family\.norm_offset must be a number, got str"),
        ({"logit_scale": 2.0}, TypeError, r"logit_scale must be a string or None, got float"),
        ({"logit_divisor": 2.0}, TypeError, r"logit_divisor must be a string or None, got float"),
        ({"softcap": 30.0}, TypeError, r"softcap must be a string or None, got float"),
    ],
)
def test_what_cannot_be_a_family(change, error, message):
    with pytest.raises(error, match=message):
        Family(**{"blocks": "model.layers", "norm": "model.norm", "norm_kind": "rms", **change})


def test_what_cannot_be_registered(table):
    with pytest.raises(TypeError, match="model_type must be a string, .* got type"):
        register_family(int, table["llama"])
    with pytest.raises(TypeError, match="family must be a Family, got dict"):
        register_family("phi", {"blocks": "model.layers"})


def test_a_description_that_misses_the_model_says_so(table):
    model = tiny.model()
    llama = table["llama"]
    table["llama"] = dataclasses.replace(llama, blocks="model.h")
    with pytest.raises(ValueError, match=r"no module 'model\.h', which its Family\.blocks names"):
        fam.blocks_of(model)
    table["llama"] = dataclasses.replace(llama, blocks="model")
    with pytest.raises(TypeError, match=r"'model' of Llama.* must be the nn\.ModuleList .*LlamaM"):
        fam.blocks_of(model)
    table["llama"] = dataclasses.replace(llama, softcap="cap")
    with pytest.raises(ValueError, match="config of LlamaForCausalLM has no 'cap'"):
        lens_head_from(model)


def test_an_opt_that_is_no_lens_is_refused():
    with pytest.raises(ValueError, match="OPTForCausalLM has no module .*no final norm"):
        lens_head_from(tiny.model("opt", do_layer_norm_before=False))
    with pytest.raises(ValueError, match="has width 16, its head 8: a projection.*word_embed_proj"):
        lens_head_from(tiny.model("opt", word_embed_proj_dim=8))


class Packed(torch.Tensor):
    """A tensor that stands in for other values."""


@pytest.mark.parametrize(
    ("replace", "found"),
    [
        (lambda x: nn.Parameter(x.data.to(torch.int8), requires_grad=False), "torch.int8"),
        (lambda x: nn.Parameter(x.data.as_subclass(Packed)), "a Packed"),
        (lambda x: nn.Parameter(x.data.to_sparse()), "sparse_coo"),
    ],
    ids=["integer", "subclass", "sparse"],
)
@pytest.mark.parametrize("part", ["head", "final norm"])
def test_weights_that_are_not_plain_are_refused(part, replace, found):
    model = tiny.model()
    module = model.lm_head if part == "head" else model.model.norm
    weight = module.weight
    del module.weight
    module.weight = replace(weight)
    with pytest.raises(TypeError, match=f"weight of the model's {part} must be a dense.*{found}"):
        lens_head_from(model)


def test_modules_that_are_not_plain_are_refused():
    class Adapter(nn.Linear):
        pass

    model = tiny.model()
    model.lm_head = Adapter(16, 64)
    with pytest.raises(TypeError, match="head is a Adapter, not a plain nn.Linear: merge"):
        lens_head_from(model)
    model = tiny.model()
    nn.utils.parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    with pytest.raises(TypeError, match="final norm is a .*not a plain norm with a weight: merge"):
        lens_head_from(model)
    model = tiny.model("opt")
    model.model.decoder.final_layer_norm = nn.LayerNorm(16, elementwise_affine=False)
    with pytest.raises(TypeError, match="LayerNorm, not a plain norm with a weight"):
        lens_head_from(model)
    model = tiny.model()
    del model.model.norm.variance_epsilon
    with pytest.raises(TypeError, match="LlamaRMSNorm, has neither variance_epsilon nor eps"):
        lens_head_from(model)


def adapted(model, **options):
    """Return the model with LoRA in every block, trained away from where it starts."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", **options)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_a_peft_model_is_read_as_the_model_inside(kind):
    plain = run(tiny.model(kind))[2].logits
    model = adapted(tiny.model(kind))
    inner = model.base_model.model
    assert fam.causal_lm_of(model) is inner and fam.causal_lm_of(inner) is inner
    assert fam.blocks_of(model) is fam.blocks_of(inner)
    assert fam.decoder_of(model) is fam.decoder_of(inner)
    hidden, _, out = run(model)
    assert (out.logits - plain).abs().max() > 0.01 * plain.abs().max()
    head = lens_head_from(model)
    assert head.weight is inner.lm_head.weight
    with torch.no_grad():
        assert_same(read(head, hidden[-1]), out.logits)
    verification.verify_lens(model)


def test_a_mixed_peft_model_is_read_as_the_model_inside():
    peft = pytest.importorskip("peft")
    inner = tiny.model()
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert fam.causal_lm_of(model) is inner
    verification.verify_lens(model)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"target_modules": ["lm_head"]}, "head is a Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "head is a ModulesToSave"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm is a ModulesToSave"),
    ],
)
def test_an_adapter_on_head_or_norm_is_refused_until_it_is_merged(options, part):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(**options))
    with pytest.raises(TypeError, match=f"{part}.*merge_and_unload.*modules_to_save"):
        lens_head_from(model)
    verification.verify_lens(model.merge_and_unload())


def test_a_tuned_norm_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="final norm is a LNTuningLayer, not a plain norm"):
        lens_head_from(peft.get_peft_model(tiny.model(), config))


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.model(), config)
    for function in (fam.causal_lm_of, fam.blocks_of, lens_head_from, verification.verify_lens):
        with pytest.raises(TypeError, match="'default' of kind PROMPT_TUNING.* such as LoRA"):
            function(model)


def test_peft_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises
    verification.verify_lens(tiny.model())
