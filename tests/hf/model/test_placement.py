"""Large teachers: quantised, on other devices than the student, or offloaded to disk."""

import importlib.metadata
import importlib.util
import json
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from lens_kernels import cli
from lens_kernels.hf import LensObjective, detect_lens, lens_head_from
from lens_kernels.hf.model import loading, placement
from lens_kernels.hf.model.loading import load_model
from lens_kernels.hf.model.placement import check_placement, placed
from lens_kernels.hf.training.collation import Collator
from tests.support import tiny
from tests.support.commands import arguments, first_loss

quantiser = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def _bitsandbytes(monkeypatch):
    """Make ``check_placement`` and older versions of transformers find bitsandbytes."""
    monkeypatch.setattr(placement, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.48.0")


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_options_become_the_config_of_the_quantiser(bits):
    options = {"dtype": torch.float16, "quantization": f"{bits}bit", "device_map": None}
    check_placement(f"{bits}bit", "cpu")
    arguments = placed(options, {})
    config = arguments.pop("quantization_config")
    assert arguments == {"dtype": torch.float16}
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert config.bnb_4bit_quant_type == "nf4" and config.llm_int8_skip_modules is None
    assert config.bnb_4bit_compute_dtype is torch.float16
    for found in ({"dtype": "bfloat16"}, {"text_config": {"torch_dtype": "bfloat16"}}):
        automatic = placed({**options, "dtype": "auto"}, found)["quantization_config"]
        assert automatic.bnb_4bit_compute_dtype is torch.bfloat16


PAIR = ("student", "teacher")
REFUSED = [
    ({"teacher_quantization": "2bit"}, "invalid choice: '2bit'"),
    ({"teacher_quantization": "4bit"}, "teacher_quantization=4bit needs the package bitsandbytes"),
    ({"teacher_device_map": "cuda:99"}, "teacher_device_map must be a device of this machine,"),
    ({"teacher_device_map": "meta"}, "the meta device holds no weights"),
    ({"teacher_device_map": "everywhere"}, "or one of auto, balanced, balanced_low_0, sequential"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_options_are_refused_before_a_model_is_loaded(
    files, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setattr("lens_kernels.hf.training.command.load_model", None)
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        raise SystemExit(cli.main(arguments(files, tmp_path / "run", **options)))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_each_process_needs_a_teacher_of_its_own(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    assert cli.main(arguments(files, tmp_path / "run", teacher_device_map="auto")) == 1
    assert "the 2 processes over the same devices: leave it out" in capsys.readouterr().err


@pytest.mark.usefixtures("_bitsandbytes")
def test_files_that_are_quantised_already_are_not_quantised_again(files, tmp_path):
    saved = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(files / "teacher").save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are quantised already, by gptq: leave 4bit quant"):
        load_model(str(saved), quantization="4bit")


def test_a_teacher_with_a_device_map_is_not_moved(files, tmp_path, monkeypatch):
    expected = first_loss(files, tmp_path / "plain")
    loaded = []

    def load(*args):
        model = loading.load_model(*args)
        if len(loaded) == 1:  # the second model is the teacher
            monkeypatch.setattr(model, "to", None)
        loaded.append((args, model))
        return model

    monkeypatch.setattr("lens_kernels.hf.training.command.load_model", load)
    found = first_loss(files, tmp_path / "run", teacher_device_map="cpu", teacher_dtype="bfloat16")
    args, teacher = loaded[1]
    assert args[1:] == ("bfloat16", False, None, "cpu")
    assert {name: str(x) for name, x in teacher.hf_device_map.items()} == {"": "cpu"}
    assert teacher.dtype is torch.bfloat16
    assert found == pytest.approx(expected, rel=0.05) and found != expected


def spread(files, folder, *disk):
    """Return a teacher. At each call, accelerate reads the modules named in ``disk`` from disk."""
    whole = {f"model.layers.{i}": "cpu" for i in range(4)}
    whole |= dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    return AutoModelForCausalLM.from_pretrained(
        files / "teacher", device_map=whole | dict.fromkeys(disk, "disk"), offload_folder=folder
    )


def test_a_teacher_whose_blocks_are_offloaded_is_served(files, tmp_path):
    student, plain = load_model(str(files / "student")), load_model(str(files / "teacher"))
    batch = Collator(1)([{"input_ids": [2, 3, 4, 5, 6], "labels": [2, 3, 4, 5, 6]}])
    teacher = spread(files, tmp_path, "model.layers.0", "model.layers.3")
    assert sum(x.is_meta for x in teacher.parameters()) > 8
    assert detect_lens(teacher) == detect_lens(plain)
    losses = [LensObjective(student, x, [1, 2], [2, 3])(batch).loss for x in (plain, teacher)]
    assert torch.equal(*losses)
    for part in ("lm_head", "model.norm"):
        with pytest.raises(ValueError, match="on the meta device, so lenses cannot read it: load"):
            detect_lens(spread(files, tmp_path, part))


def test_the_head_of_a_teacher_elsewhere_is_copied_once(monkeypatch, files):
    student, teacher = [load_model(str(files / x), "auto", False, None, "cpu") for x in PAIR]
    objective = LensObjective(student, teacher, [1], [2])

    def elsewhere(model):  # moves only the student to another device
        head = lens_head_from(model)
        return head.map(lambda x: x.to("meta")) if model is student else head

    monkeypatch.setattr("lens_kernels.hf.training.objective.lens_head_from", elsewhere)
    heads = [objective.heads() for _ in range(2)]
    assert {head.weight.device.type for pair in heads for head in pair} == {"meta"}
    assert heads[0][1].weight is heads[1][1].weight
    assert lens_head_from(teacher).weight.device.type == "cpu"


@quantiser
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_teacher_trains_a_student(tmp_path, bits):
    from tests.support import commands

    teacher = tiny.model(layers=4, width=64, vocab=64, tie_word_embeddings=False, seed=2)
    for name, model in (("teacher", teacher), ("student", tiny.model(layers=3, seed=1))):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer(64).save_pretrained(tmp_path / name)
    commands.write_rows(tmp_path / "train.jsonl", commands.ROWS)
    quantised = load_model(str(tmp_path / "teacher"), "float32", quantization=bits)
    linear = quantised.model.layers[0].mlp.up_proj.weight
    assert linear.dtype is (torch.uint8 if bits == "4bit" else torch.int8)
    assert torch.equal(lens_head_from(quantised).weight, teacher.lm_head.weight)
    losses = {
        name: first_loss(tmp_path, tmp_path / str(name), teacher_quantization=name)
        for name in (None, bits)
    }
    assert losses[bits] == pytest.approx(losses[None], rel=0.3) and losses[bits] != losses[None]
