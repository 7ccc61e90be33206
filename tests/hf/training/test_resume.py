"""A second call of ``lens-kernels train`` resumes the run, or explains why it cannot."""

import json

import pytest
import torch

from lens_kernels import cli
from lens_kernels.hf import LensDistillTrainer
from lens_kernels.hf.training import command
from tests.support.commands import arguments, weights


def interrupt(monkeypatch, argv, before_step):
    """Run the command, and interrupt it before this training step."""
    calls = []
    step = LensDistillTrainer.training_step

    def cut(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == before_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LensDistillTrainer, "training_step", cut)
        assert cli.main(argv) == 130


def assert_equal(one, other, error=0.0):
    for name, x in weights(one).items():
        torch.testing.assert_close(weights(other)[name], x, rtol=0, atol=error, msg=name)


@pytest.mark.parametrize("cache", [False, True])
def test_resumed_run_ends_with_the_same_student(files, tmp_path, monkeypatch, capsys, cache):
    options = {"max_steps": 6, "gradient_accumulation_steps": 2}
    options |= {"teacher_cache": tmp_path / "cache"} if cache else {}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupt(monkeypatch, argv, before_step=10)
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert f"resuming from {tmp_path / 'cut' / 'checkpoint-4'}" in capsys.readouterr().out
    assert_equal(tmp_path / "whole", tmp_path / "cut", 1e-6)


@pytest.mark.parametrize("finished", [True, False])
def test_run_past_its_last_step_does_not_train(files, tmp_path, monkeypatch, capsys, finished):
    # An epoch has 4 steps, so the run ends in its second epoch.
    argv = arguments(files, tmp_path, max_steps=5, eval=files / "eval.jsonl")
    assert cli.main(argv) == 0
    end, metrics = weights(tmp_path), (tmp_path / "metrics.json").read_text()
    # This is the state after an interrupt between the last checkpoint and the end.
    if not finished:
        (tmp_path / "metrics.json").write_text(metrics[:-5])
        (tmp_path / "model.safetensors").unlink()
    forbidden = "training_step" if not finished else "train"
    monkeypatch.setattr(
        LensDistillTrainer, forbidden, lambda *_, **__: pytest.fail("the run trained again")
    )
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert ("is already complete: delete" in capsys.readouterr().out) == finished
    again = weights(tmp_path)
    assert all(torch.equal(end[name], again[name]) for name in end)
    loss = json.loads((tmp_path / "metrics.json").read_text())["eval_loss"]
    assert loss == pytest.approx(json.loads(metrics)["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("content", [b"", b"- a", b"\xff\xfe", b"a: [", b"[" * 5000])
def test_an_unreadable_record_is_refused(files, tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_bytes(content)
    assert cli.main(arguments(files, tmp_path)) == 1
    shown = capsys.readouterr().err
    assert "run.yaml, the options of the run in this folder, cannot be read (" in shown


@pytest.mark.parametrize("name", ["data.json", "metrics.json"])
def test_a_record_that_is_no_object_counts_as_missing(files, tmp_path, name):
    (tmp_path / name).write_text("[1]")
    assert command._json_of(tmp_path / name) is None
    assert cli.main(arguments(files, tmp_path, max_steps=1)) == 0


def test_incomplete_checkpoints_are_skipped(tmp_path):
    assert command.last_checkpoint(tmp_path / "nothing") is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text('{"a": 1}')
        assert command.last_checkpoint(tmp_path) == state.parent
    state.write_text('{"a": ')
    assert command.last_checkpoint(tmp_path).name == "checkpoint-2"
    state.unlink()
    assert command.last_checkpoint(tmp_path).name == "checkpoint-2"


def test_run_without_optimizer_state_starts_over(files, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 5, "save_only_model": True}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupt(monkeypatch, argv, before_step=4)
    assert command.last_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    assert cli.main(argv) == 0
    assert "resuming" not in capsys.readouterr().out
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_another_run_in_the_same_folder_is_refused(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path, max_steps=1)) == 0
    assert cli.main(arguments(files, tmp_path, max_steps=1, beta=0.3, learning_rate=0.02)) == 1
    shown = capsys.readouterr().err
    assert "beta (was None, is 0.3), learning_rate (was 0.01, is 0.02)" in shown


@pytest.mark.parametrize(("name", "done"), [("train", False), ("eval", True)])
def test_run_does_not_resume_with_changed_data(files, tmp_path, monkeypatch, capsys, name, done):
    data, before = tmp_path / "data.jsonl", (files / "train.jsonl").read_text()
    data.write_text(before)
    argv = arguments(files, tmp_path / "out", **{"eval": files / "eval.jsonl", name: data})
    if done:
        assert cli.main(argv) == 0
    else:
        interrupt(monkeypatch, argv, before_step=4)
    data.write_text(before.replace("fish swim", "fish swam"))
    assert cli.main(argv) == 1
    message = f"{name} file {data} has changed since the run in {tmp_path / 'out'} started: restore"
    assert message in capsys.readouterr().err
    # Earlier versions did not write data.json.
    (tmp_path / "out" / "data.json").unlink()
    assert cli.main(argv) == 0
