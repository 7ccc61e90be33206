"""peft alone can load an adapter that the trainer saved, and gets the trained model."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lens_kernels import cli
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy
from tests.support import tiny
from tests.support.commands import arguments
from tests.support.training import STUDENT, make_trainer, tokens, with_lora

IDS = tokens(batch=2, length=6)
LORA = {"lora_r": 2, "lora_target_modules": ["q_proj", "up_proj"], "num_lens_pairs": 1}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def auto(folder):
    return logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Return the output folder of a run that trained an adapter on two of the student's blocks."""
    output = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)
        assert cli.main(arguments(files, output, student_blocks=[1, 3], **LORA)) == 0
    return output


def test_an_adapter_of_some_blocks_is_saved_with_its_base(files, run):
    start = AutoModelForCausalLM.from_pretrained(files / "student")
    base = shallow_copy(start, [1, 3])
    before = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, run))
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(auto(run), expected)
    assert torch.equal(logits(load_model(str(run))), expected)
    saved = AutoModelForCausalLM.from_pretrained(run / "base_model")
    assert saved.config.num_hidden_layers == 2 and torch.equal(logits(saved), before)
    # Checkpoints have no base model of their own. They use the base model in the run's folder.
    assert not (run / "checkpoint-4" / "base_model").exists()
    assert torch.equal(auto(run / "checkpoint-4"), expected)
    assert not torch.equal(auto(run / "checkpoint-2"), expected)


def test_a_run_may_be_moved(run, tmp_path):
    expected = auto(run)
    moved = shutil.copytree(run, tmp_path / "moved")
    config = moved / "adapter_config.json"
    recorded = json.loads(config.read_text())
    assert recorded["base_model_name_or_path"] == str(run / "base_model")
    # The base model beside the adapter is used, although another base model is at the recorded
    # path.
    recorded["base_model_name_or_path"] = str(tmp_path / "other" / "base_model")
    config.write_text(json.dumps(recorded))
    tiny.model(layers=2, seed=9).save_pretrained(tmp_path / "other" / "base_model")
    assert torch.equal(logits(load_model(str(moved))), expected)
    base = AutoModelForCausalLM.from_pretrained(moved / "base_model")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, moved)), expected)
    (moved / "tokenizer_config.json").unlink()
    shutil.copy(run / "tokenizer.json", moved / "base_model")
    shutil.copy(run / "tokenizer_config.json", moved / "base_model")
    assert load_tokenizer(str(moved)).get_vocab() == tiny.tokenizer().get_vocab()


def test_a_run_with_an_adapter_of_some_blocks_resumes(files, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "out")
    (again / "metrics.json").unlink()
    shutil.rmtree(again / "checkpoint-4")
    assert cli.main(arguments(files, again, student_blocks=[1, 3], **LORA)) == 0
    assert (auto(again) - auto(run)).abs().max() < 1e-5


def adapted(student, **options):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        init_lora_weights=False,
        **{"target_modules": ["q_proj"], **options},
    )
    return peft.get_peft_model(student, config)


@pytest.mark.parametrize(
    ("kind", "tied", "dtype"),
    [
        ("llama", True, torch.float32),
        ("llama", False, torch.bfloat16),
        ("gpt2", True, torch.float32),
    ],
)
def test_the_trainer_saves_a_base_that_no_files_hold(tmp_path, kind, tied, dtype):
    modules = ["c_attn"] if kind == "gpt2" else ["q_proj", "mlp.down_proj"]
    base = tiny.model(kind, **STUDENT, tie_word_embeddings=tied)
    # Buffers such as rotary frequencies stay float32, because no file has them.
    for x in base.parameters():
        x.data = x.data.to(dtype)
    student = adapted(base, target_modules=modules)
    trainer = make_trainer(tmp_path / "out", student=student)
    trainer.save_model(str(tmp_path / "elsewhere"))
    # the base model is in the folder "elsewhere"
    assert not (tmp_path / "out" / "base_model").exists()
    assert torch.equal(auto(tmp_path / "elsewhere"), logits(student))


def test_a_base_of_other_files_is_saved_and_one_on_disk_is_not(files, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(files / "student")
    make_trainer(tmp_path / "whole", student=adapted(whole)).save_model()
    assert not (tmp_path / "whole" / "base_model").exists()
    assert torch.equal(auto(tmp_path / "whole"), logits(load_model(str(tmp_path / "whole"))))
    cut = AutoModelForCausalLM.from_pretrained(files / "student")
    cut.model.layers, cut.config.num_hidden_layers = cut.model.layers[:2], 2
    student = adapted(cut)  # the files with this name hold the model with all blocks
    make_trainer(tmp_path / "cut", student=student, num_lens_pairs=1).save_model()
    assert torch.equal(auto(tmp_path / "cut"), logits(student))


def test_zero_3_saves_only_an_adapter_but_the_base_is_whole(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, student=with_lora(tiny.model(**STUDENT)))
    model = trainer.model.eval()
    held = {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}
    monkeypatch.setattr(transformers.Trainer, "save_model", lambda self, x: self._save(x, held))
    monkeypatch.setattr("lens_kernels.hf.training.trainer.is_partitioned", lambda _: True)
    trainer.save_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(load_model(str(tmp_path / "adapter"))), logits(model))
