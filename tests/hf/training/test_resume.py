"""A repeated command resumes the run, or explains why it cannot."""

import json
import os
import re
import shutil

import pytest
import torch
import yaml

from lens_kernels import LensTranslator, cli
from lens_kernels.hf import LensDistillTrainer
from lens_kernels.hf.training.provenance import folder_digest
from lens_kernels.hf.training.translators import save_translators
from tests.support import tiny
from tests.support.commands import arguments, assert_same_student, interrupt, weights


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
    assert_same_student(tmp_path / "whole", tmp_path / "cut", 1e-6)
    metrics = [json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("whole", "cut")]
    # A run that resumed reports no mean loss, because transformers has only the losses since the
    # checkpoint.
    assert "train_loss" in metrics[0] and "train_loss" not in metrics[1]


@pytest.mark.parametrize("finished", [True, False])
def test_run_past_its_last_step_does_not_train(files, tmp_path, monkeypatch, capsys, finished):
    # An epoch has 4 steps, so step 5, the last step, is in the second epoch.
    argv = arguments(files, tmp_path, max_steps=5, eval_data=files / "eval.jsonl")
    assert cli.main(argv) == 0
    end, metrics = weights(tmp_path), (tmp_path / "metrics.json").read_text()
    # Change the folder as if the run had been interrupted between its last checkpoint and its end.
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


@pytest.mark.parametrize(
    "content", [b"", b"- a", b"\xff\xfe", b"a: [", pytest.param(b"[" * 5000, id="nested")]
)
def test_an_unreadable_record_is_refused(files, tmp_path, capsys, content):
    name = "run.yaml"
    (tmp_path / name).write_bytes(content)
    assert cli.main(arguments(files, tmp_path)) == 1
    shown = capsys.readouterr().err
    assert f"{name}, the record of the run in this folder, cannot be read (" in shown


def test_metrics_that_are_no_object_count_as_missing(files, tmp_path):
    (tmp_path / "metrics.json").write_text("[1]")
    assert cli.main(arguments(files, tmp_path, max_steps=1)) == 0


def test_run_without_optimizer_state_starts_over(files, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 5, "save_only_model": True}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupt(monkeypatch, argv, before_step=4)
    assert (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").exists()
    assert cli.main(argv) == 0
    assert "resuming" not in capsys.readouterr().out
    assert_same_student(tmp_path / "whole", tmp_path / "cut")


def test_another_run_in_the_same_folder_is_refused(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path, max_steps=2)) == 0
    other = {"beta": 0.3, "learning_rate": 0.02, "student_layers": [1], "teacher_layers": [1]}
    other |= {"max_steps": 1, "per_device_train_batch_size": None, "teacher": files / "other"}
    assert cli.main(arguments(files, tmp_path, **other)) == 1
    shown = capsys.readouterr().err
    for change in (
        "beta (was 0.5, is 0.3), learning_rate (was 0.01, is 0.02), max_steps (was 2, is 1)",
        "per_device_train_batch_size (was 2, is 8), student_layers (was None, is [1])",
        f"teacher (was {files / 'teacher'}, is {files / 'other'})",
    ):
        assert change in shown


def test_a_run_that_left_nothing_starts_over_with_other_options(files, tmp_path, monkeypatch):
    interrupt(monkeypatch, arguments(files, tmp_path, max_steps=2), before_step=1)
    assert {x.name for x in tmp_path.iterdir()} == {"run.yaml"}
    options = {"max_steps": 1, "beta": 0.3, "data": files / "eval.jsonl"}
    assert cli.main(arguments(files, tmp_path, **options)) == 0
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["beta"] == 0.3


# Each case has the options of a run, and other options with which the run must still continue.
SAME = [
    (
        {},
        {"report_to": "tensorboard", "logging_steps": 2, "run_name": "again"},
    ),
    ({}, {"save_steps": 3, "save_total_limit": 2, "eval_strategy": "no", "eval_steps": 2}),
    ({"student": "student", "data": "train.jsonl", "in": "here"}, {}),
    ({}, {"teacher": "teacher", "data": "copy.jsonl", "in": "here"}),
    ({}, {"gradient_checkpointing": True, "dataloader_num_workers": 0, "beta": 0.5}),
]


@pytest.mark.parametrize(
    ("first", "second"), SAME, ids=["logs", "saves", "relative", "copy", "memory"]
)
def test_options_that_change_no_weight_do_not_stop_a_run(
    files, tmp_path, monkeypatch, capsys, first, second
):
    monkeypatch.chdir(files)
    (files / "copy.jsonl").write_text((files / "train.jsonl").read_text())
    places = {"here": os.path.relpath(tmp_path / "out", files), None: tmp_path / "out"}
    one, two = (
        arguments(
            files, places[options.get("in")], **{k: x for k, x in options.items() if k != "in"}
        )
        for options in (first, second)
    )
    interrupt(monkeypatch, one, before_step=4)
    capsys.readouterr()
    assert cli.main(two) == 0
    shown = capsys.readouterr().out
    assert "resuming from" in shown and "checkpoint-2" in shown


def test_options_that_choose_the_best_weights_count_with_them(files, tmp_path, capsys):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_data": files / "eval.jsonl",
    }
    assert cli.main(arguments(files, tmp_path, eval_steps=2, **best)) == 0
    assert cli.main(arguments(files, tmp_path, eval_steps=4, save_steps=4, **best)) == 1
    shown = capsys.readouterr().err
    assert re.search(r"eval_steps \(was 2.*, is 4.*\), save_steps \(was 2.*, is 4.*\)", shown)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_complete_run_can_be_continued(files, tmp_path, capsys, schedule):
    options = {"lr_scheduler_type": schedule}
    assert cli.main(arguments(files, tmp_path / "more", max_steps=4, **options)) == 0
    capsys.readouterr()
    assert cli.main(arguments(files, tmp_path / "more", max_steps=6, **options)) == 0
    shown = capsys.readouterr().out
    assert "max_steps was 4 and is 6: the run is continued" in shown
    assert "resuming from" in shown and "checkpoint-4" in shown
    assert ("the linear schedule is that of the longer run" in shown) == (schedule == "linear")
    assert cli.main(arguments(files, tmp_path / "whole", max_steps=6, **options)) == 0
    if schedule == "constant":
        assert_same_student(tmp_path / "whole", tmp_path / "more", 1e-6)
    assert cli.main(arguments(files, tmp_path / "more", max_steps=6, **options)) == 0
    assert "is already complete: delete" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "name"), [("data", "train"), ("eval_data", "eval")])
def test_run_does_not_resume_with_changed_data(files, tmp_path, monkeypatch, capsys, option, name):
    data, before = tmp_path / "data.jsonl", (files / "train.jsonl").read_text()
    data.write_text(before)
    argv = arguments(files, tmp_path / "out", **{"eval_data": files / "eval.jsonl", option: data})
    if name == "eval":
        assert cli.main(argv) == 0
    else:
        interrupt(monkeypatch, argv, before_step=4)
    data.write_text(before.replace("fish swim", "fish swam"))
    assert cli.main(argv) == 1
    message = f"{name} file {data} has changed since the run in {tmp_path / 'out'} started: restore"
    assert message in capsys.readouterr().err
    # If an edited record has no hashes, only the options are compared.
    record = tmp_path / "out" / "run.yaml"
    record.write_text(record.read_text().partition("made_with:")[0])
    assert cli.main(argv) == 0


def test_run_does_not_resume_with_changed_translators(files, tmp_path, monkeypatch, capsys):
    lens = tmp_path / "lens.safetensors"

    def write(value):
        made = LensTranslator(torch.zeros(24, 24), torch.full((24,), value))
        save_translators(lens, {2: made})

    write(0.0)
    options = {"teacher_lens": lens, "num_lens_pairs": 1}
    interrupt(monkeypatch, arguments(files, tmp_path / "out", **options), before_step=4)
    write(0.5)
    argv = arguments(files, tmp_path / "out", **options)
    assert cli.main(argv) == 1
    assert f"the teacher_lens file {lens} has changed since the run" in capsys.readouterr().err
    write(0.0)
    monkeypatch.chdir(tmp_path)  # another path to the same file
    options["teacher_lens"] = lens.name
    assert cli.main(arguments(files, tmp_path / "out", **options)) == 0


def test_the_digest_of_a_folder_follows_its_manifests_and_lens(tmp_path):
    digests = set()
    for name, content in (("a/manifest.json", "1"), ("a/manifest.json", "2"), ("params.pt", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        digests.add(folder_digest(tmp_path))
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_run_does_not_resume_with_another_tokenizer(files, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(files / "student", tmp_path / "student")
    argv = arguments(files, tmp_path / "out", student=tmp_path / "student")
    interrupt(monkeypatch, argv, before_step=4)
    with (tmp_path / "student" / name).open("a") as file:
        file.write(" ")
    assert cli.main(argv) == 1
    assert f"{tmp_path / 'student'} has changed since the run in" in capsys.readouterr().err


def test_run_does_not_resume_with_another_teacher(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / "teacher", tmp_path / "teacher")
    argv = arguments(files, tmp_path / "out", teacher=tmp_path / "teacher")
    interrupt(monkeypatch, argv, before_step=4)
    tiny.model(layers=4, width=24, seed=3).save_pretrained(tmp_path / "teacher")
    assert cli.main(argv) == 1
    message = f"the teacher model {tmp_path / 'teacher'} has changed since the run in"
    assert message in capsys.readouterr().err
