"""Models, adapters and tokenizers are loaded from folders or from the Hub's cache."""

import functools
import json
import shutil
import sys
from unittest.mock import Mock

import peft
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lens_kernels.hf.model.loading import check_tokenizers, load_model, load_tokenizer
from tests.support import refusals, tiny

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a model and an adapter.

    The adapter has random weights and no tokenizer.
    """
    folder = tmp_path_factory.mktemp("files")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(files, tmp_path):
    """Return a copy of the adapter's folder, which a test may change."""
    return shutil.copytree(files / "adapter", tmp_path / "copy")


def put_on(adapter, model):
    """Write the name of the base model into the adapter's config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(files, tmp_path):
    """Return a copy of the model's folder, which a test may change."""
    return shutil.copytree(files / "model", tmp_path / "model")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


refused = functools.partial(refusals.refused, ValueError)


def test_load_model_uses_the_requested_dtype(files, saved):
    model = load_model(str(files / "model"))
    assert torch.equal(logits(model), logits(tiny.model())) and not model.training
    assert load_model(str(files / "model"), "bfloat16").dtype is torch.bfloat16
    tiny.model().to(torch.float16).save_pretrained(saved)
    assert load_model(str(saved), "auto").dtype is torch.float16
    assert load_model(str(saved), "float32").dtype is torch.float32
    refused(["auto, float32, bfloat16, float16", "'int8'"], load_model, str(saved), "int8")


def test_load_model_loads_an_adapter_that_is_trainable(files):
    model = load_model(str(files / "adapter"))
    expected = logits(peft.AutoPeftModelForCausalLM.from_pretrained(files / "adapter"))
    assert torch.equal(logits(model), expected)
    assert (expected - logits(tiny.model())).abs().max() > 0.01
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert not any(module.training for module in model.modules())


def test_an_adapter_in_a_relative_path_is_no_name_on_the_hub(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(HfApi, "file_exists", lambda *args, **_: pytest.fail("the Hub was asked"))
    expected = logits(load_model(str(files / "adapter")))
    assert torch.equal(logits(load_model("adapter")), expected)


def renamed(file, change):
    """Rename the tensors of a safetensors file by ``change``, and drop a tensor if its new name is
    None."""
    tensors = {change(key): x for key, x in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_weights_under_other_names_are_not_replaced_by_random_ones(saved, adapter, prefix):
    renamed(saved / "model.safetensors", lambda key: prefix + key)
    words = [repr(str(saved)), "lack weights of the model", "'lm_head.weight'", "save_pretrained"]
    refused(words, load_model, str(saved))
    put_on(adapter, saved)
    refused([repr(str(adapter)), *words], load_model, str(adapter))


def test_one_missing_weight_is_refused_and_tied_heads_and_value_heads_are_not(saved):
    file = saved / "model.safetensors"
    renamed(file, lambda key: None if key == "model.norm.weight" else key)
    refused(["1 keys, 'model.norm.weight'"], load_model, str(saved))
    tiny.model(tie_word_embeddings=True).save_pretrained(saved)
    renamed(file, lambda key: None if key == "lm_head.weight" else key)
    save_file(load_file(file) | {"v_head.weight": torch.ones(1)}, file, {"format": "pt"})
    expected = logits(tiny.model(tie_word_embeddings=True))
    assert torch.equal(logits(load_model(str(saved))), expected)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"attention_bias": False}], ids=str)
def test_a_config_that_leaves_weights_out_is_refused(saved, change):
    tiny.model(attention_bias=True).save_pretrained(saved)
    load_model(str(saved))
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    refused(["hold weights that the model does not use", "model.layers."], load_model, str(saved))


@pytest.mark.parametrize("layers", [3, 5])
def test_an_adapter_of_a_model_of_another_depth_is_refused(saved, adapter, layers):
    """An adapter for four blocks is refused on a model of three or five blocks.

    On such a model, a part of the adapter would have no effect, or some blocks would have no
    adapter.
    """
    tiny.model(layers=layers).save_pretrained(saved)
    put_on(adapter, saved)
    what = "lack weights of the adapter" if layers > 4 else "hold weights that the model lacks"
    refused([repr(str(adapter)), what, f"layers.{min(layers, 4)}."], load_model, str(adapter))


def test_an_adapter_with_more_tokens_needs_their_embeddings(files, adapter):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(adapter)
    refused(["has 72 tokens", "holds no embeddings"], load_model, str(adapter))
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    base.resize_token_embeddings(72)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    whole = peft.get_peft_model(base, config).eval()
    whole.save_pretrained(adapter, save_embedding_layers=True)
    assert torch.equal(logits(load_model(str(adapter))), logits(whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_type": "SEQ_CLS"}, ["task_type must be CAUSAL_LM, got"]),
        (
            {"base_model_name_or_path": ""},
            ["has no base_model_name_or_path", "Save the base model"],
        ),
    ],
)
def test_an_adapter_of_something_else_is_refused(adapter, change, words):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    refused(words, load_model, str(adapter))


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_weights_that_are_nan_are_refused(saved, adapter, key):
    tensors = load_file(saved / "model.safetensors")
    tensors[key].view(-1)[-1] = float("nan")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    refused([repr(str(saved)), f"NaN in {key}"], load_model, str(saved))
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refused([repr(str(adapter)), "NaN in ", "lora_A"], load_model, str(adapter))


def test_a_config_with_blocks_without_end_is_refused(saved, monkeypatch):
    monkeypatch.setattr("lens_kernels.hf.model.loading.MOST_BLOCKS", 3)
    refused(["num_hidden_layers=4", "at most 3"], load_model, str(saved))


@pytest.mark.parametrize("value", ["x", [[1]]])
def test_a_tokenizer_that_cannot_be_called_is_refused(saved, value):
    file = saved / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": value}))
    refused([repr(str(saved)), "tokenizer", "cannot be read"], load_tokenizer, str(saved))


@pytest.mark.parametrize("kernel", ["some-one/kernels", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(saved, key, kernel):
    """If no installed package has the kernel, transformers would download it from the Hub."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: kernel}))
    refused([f"{key}={kernel!r}", "is not run", "remove"], load_model, str(saved))
    (saved / "config.json").write_text(json.dumps(config | {key: "eager"}))
    load_model(str(saved))


def test_adapter_uses_its_own_tokenizer_or_that_of_its_base_model(files, adapter):
    assert load_tokenizer(str(adapter)).get_vocab() == tiny.tokenizer().get_vocab()
    tiny.tokenizer(vocab=60).save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).get_vocab() == tiny.tokenizer(60).get_vocab()


def test_hub_names_are_loaded_from_the_local_cache(files, adapter, hub):
    name = hub(files / "model", "some/model")
    assert torch.equal(logits(load_model(name)), logits(tiny.model()))
    put_on(adapter, name)
    name = hub(adapter, "some/adapter")
    expected = logits(load_model(str(files / "adapter")))
    assert torch.equal(logits(load_model(name)), expected)
    assert load_tokenizer(name).get_vocab() == tiny.tokenizer().get_vocab()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    name = hub(adapter, "some/pickle")
    refused(["'some/pickle'", "adapter_model.safetensors"], load_model, name)


def test_weights_are_read_only_from_safetensors(saved, adapter, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **_: pytest.fail("a pickle was read"))
    read, given = AutoModelForCausalLM.from_pretrained, []

    def recording(*args, **options):
        given.append(options)
        return read(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recording)
    put_on(adapter, saved)
    load_model(str(adapter))
    # use_safetensors=True makes transformers refuse pickles
    assert [x["use_safetensors"] for x in given] == [True]
    torch.save(tiny.model().state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    refused([repr(str(saved)), "model.safetensors", "folder"], load_model, str(saved))
    refused([repr(str(adapter)), "cannot be read"], load_model, str(adapter))
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    words = [repr(str(adapter)), "adapter_model.safetensors", "save_pretrained"]
    refused(words, load_model, str(adapter))


def test_an_adapter_needs_peft(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"adapter' needs the package peft: pip install 'lens-"):
        load_model(str(files / "adapter"))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_hub_is_asked_if_allowed(files, adapter, monkeypatch, adapted):
    put_on(adapter, "some/base")
    asked = []

    def record(target, result):
        def function(path, *args, **options):
            asked.append((path, options["local_files_only"]))
            assert options.get("trust_remote_code") in (None, False)
            return result

        monkeypatch.setattr(target, function)

    where = str(adapter / "adapter_config.json")
    module = "lens_kernels.hf.model.loading"
    record(f"{module}.find_adapter_config_file", where if adapted else None)
    record(f"{module}.cached_file", where)
    record(f"{module}.PretrainedConfig.get_config_dict", ({}, {}))
    loaded = tiny.model(), {"missing_keys": [], "unexpected_keys": []}
    record(f"{module}.AutoModelForCausalLM.from_pretrained", loaded)
    record(f"{module}.AutoTokenizer.from_pretrained", Mock())
    load_model("some/name", "auto", True)
    load_tokenizer("some/name", True)
    base = "some/base" if adapted else "some/name"
    found = ["some/name"] * (1 + adapted)
    names = [*found, base, base, base, *found, "some/name"]
    assert asked == [(name, False) for name in names]


def test_no_read_opens_a_connection(files, adapter, hub, connections):
    base = hub(files / "model", "some/base")
    put_on(adapter, base)
    hub(adapter, "some/adapter")
    model = load_model(base)
    assert torch.equal(logits(model), logits(tiny.model()))
    assert model.name_or_path == model.config.name_or_path == base
    for name in (str(adapter), "some/adapter"):
        load_model(name), load_tokenizer(name)
    load_tokenizer(base)
    put_on(adapter, "no/base")
    for name in (str(adapter), "no/model"):
        refused([name], load_model, name)
        refused([name], load_tokenizer, name)
    assert connections == []


def test_a_repository_without_safetensors_is_not_converted(files, saved, hub, connections):
    """transformers would ask a service on the Hub to convert the repository."""
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"a pickle")
    words = ["model.safetensors", "save_pretrained"]
    refused(words, load_model, str(saved))
    refused(words, load_model, hub(saved, "some/pickle"))
    assert connections == []


@pytest.mark.parametrize("function", [load_model, load_tokenizer])
def test_errors_for_missing_models_suggest_a_fix(function, hub, tmp_path):
    for path in (str(tmp_path / "none"), "some/name", str(tmp_path)):
        refused([repr(path), "cannot be read", "or allow_download for a name"], function, path)
    args = ("auto", True) if function is load_model else (True,)
    refused(["folder", "or a name on the Hub"], function, "some/name", *args)


@pytest.mark.parametrize("text", ["{}", '{"a"', ""])
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_model),
        ("model.safetensors", load_model),
        ("tokenizer.json", load_tokenizer),
        ("adapter_config.json", load_tokenizer),
        ("adapter_model.safetensors", load_model),
    ],
)
def test_error_for_a_broken_file_names_the_model(saved, adapter, name, load, text):
    folder = adapter if "adapter" in name else saved
    (folder / name).write_text(text)
    refused([repr(str(folder)), "cannot be read: "], load, str(folder))


def test_check_tokenizers_compares_token_ids():
    tokenizer = tiny.tokenizer()
    check_tokenizers(tokenizer, tiny.tokenizer())
    words = ["different ids for 3 tokens", "'(' (student 60, teacher None)", "same tokenizer"]
    refused(words, check_tokenizers, tokenizer, tiny.tokenizer(vocab=60))
    added, swapped = tiny.tokenizer(), tiny.tokenizer()
    added.add_tokens(["one", "two"])
    swapped.add_tokens(["two", "one"])
    refused(["2 tokens", "'one' (student 63, teacher 64)"], check_tokenizers, added, swapped)


def test_above_the_shared_vocabulary_only_tokens_of_the_data_are_compared():
    # The second tokenizer lacks "(", ")" and "=".
    long, short = tiny.tokenizer(), tiny.tokenizer(vocab=60)
    check_tokenizers(long, short, 60, [5, 59])
    check_tokenizers(short, long, 60, [5, 59])
    words = [
        "different ids for 1 tokens: ')' (student 61",
        "the data hold them",
        "vocab_size is 60",
    ]
    refused(words, check_tokenizers, long, short, 60, [5, 61])
    refused(["for 1 tokens: '(' (student 60"], check_tokenizers, long, short, 61)
    # Equal tokenizers pass with any ids.
    check_tokenizers(long, tiny.tokenizer(), 60, [5, 61])
    # The message suggests ``vocab_size`` only if this option would help.
    refused(["with vocab_size 60"], check_tokenizers, long, short)
    with pytest.raises(ValueError) as caught:
        check_tokenizers(long, short, ids=[61])
    assert "vocab_size" not in str(caught.value)
