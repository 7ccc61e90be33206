"""A run writes a model card, a record, a picture and checkpoints, and lines to the terminal."""

import hashlib
import json
import os
import re
import subprocess

import pytest
import yaml
from huggingface_hub import ModelCard

from lens_kernels import cli, pictures
from lens_kernels.hf.training import provenance, report
from lens_kernels.hf.training.console import line
from tests.support.commands import arguments
from tests.support.training import trained


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Return the folder of a run with evaluation, and the figure that it saved."""
    output = tmp_path_factory.mktemp("run") / "out|put"
    options = {"eval_data": files / "eval.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    options |= {"hub_token": "hf_secret", "save_steps": 1, "kd_ratio": 0.5, "mse_coeff": 0.01}
    options["token_clip"] = 9.0
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda figure, _: drawn.append(figure))
        patch.setattr("lens_kernels.hf.training.report.loss_figure", FIGURE)
        assert cli.main(arguments(files, output, **options)) == 0
    return output, drawn[0]


FIGURE = report.loss_figure


def test_the_card_describes_the_run_and_holds_no_secret(files, run):
    output, _ = run
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers" and "logit-lens" in card.data.tags
    assert card.data.base_model is None  # a model card may name only models on the Hub
    metrics = json.loads((output / "metrics.json").read_text())
    for expected in (
        f"`{files / 'student'}`, distilled from `{files / 'teacher'}` with lens_kernels",
        "Lens pairs, block of the student and of the teacher: 1 and 1, 2 and 3.",
        "| kd_ratio | 0.5 |",
        "| lr_scheduler_type | linear |",
        "| token_clip | 9 |",
        "| standardize | none |",
        f"| eval_lens_1 | {metrics['eval_lens_1']:.6g} |",
        "## Metrics after 4 steps",
        f"| {hashlib.sha256((files / 'train.jsonl').read_bytes()).hexdigest()} |",
        f"| torch | {provenance.versions()['torch']} |",
        "\nlens-kernels train --student ",
        f"--output_dir '{output}' ",
    ):
        assert expected in card.text, expected
    assert "hf_secret" not in card.text and "| None |" not in card.text


def test_the_record_has_versions_and_hashes_and_repeats_the_run(files, run, tmp_path, capsys):
    record = yaml.safe_load((run[0] / "run.yaml").read_text())
    made = record["made_with"]
    assert made["versions"]["transformers"] == provenance.versions()["transformers"]
    assert made["hashes"].keys() == {"train", "eval", "student", "teacher"}
    assert made["hashes"]["student"] == provenance.model_digest(str(files / "student"))
    assert len(set(made["hashes"].values())) == 4
    again = ["train", "--config", str(run[0] / "run.yaml"), "--output_dir", str(tmp_path)]
    assert cli.main([*again, "--max_steps", "1", "--save_strategy", "no"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown and max(map(len, shown)) <= 100
    assert "step 1/1  loss " in "\n".join(shown)


def test_only_the_last_checkpoints_stay_and_the_whole_log_is_kept(run):
    assert sorted(x.name for x in run[0].glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    logs = json.loads((run[0] / "trainer_state.json").read_text())["log_history"]
    assert [x["step"] for x in logs if "entropy_teacher_3" in x] == [1, 2, 3, 4]


def test_the_picture_shows_every_term_every_pair_and_evaluation(run):
    terms, pairs = run[1].axes
    shown = [{x.get_label(): x for x in axes.lines} for axes in (terms, pairs)]
    names = ["loss", "cross entropy", "final reverse_kl", "mean over lens pairs", "MSE (no unit)"]
    assert [*shown[0]][:1] == ["loss"] and {*names, "evaluation"} <= shown[0].keys()
    assert {"block 1", "block 2", "evaluation"} <= shown[1].keys()
    assert all(len(shown[0][name].get_xdata()) == 4 for name in names)
    held = [x for x in terms.lines if x.get_marker() == "D" and len(x.get_xdata())]
    assert len(held) == 5 and all([*x.get_xdata()][:2] == [2, 4] for x in held)
    # The lines of short runs have markers, and the axis has ticks only at whole steps.
    assert shown[0]["loss"].get_marker() == "o"
    assert all(float(x).is_integer() for x in terms.get_xticks())


def test_a_picture_of_one_step_has_no_empty_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, _: drawn.append(figure))
    FIGURE(tmp_path / "a.png", [{"step": 1, "loss": 2.0, "ce": 2.0}, {"step": 1, "x": 1}], "jsd")
    (axes,) = drawn[0].axes
    assert [x.get_label() for x in axes.lines] == ["loss", "cross entropy"]
    FIGURE(tmp_path / "a.png", [{"step": 1, "train_loss": 2.0}], "jsd")
    assert len(drawn) == 1


def test_lines_fit_a_terminal_and_show_the_important_numbers():
    logs = dict.fromkeys(("ce", "kd", "lens", "mse", "grad_norm", "learning_rate"), 1.23456e-10)
    text = line(1_000_000, 2_000_000, {"loss": 12.3456789, "tokens_per_second": 123456.7, **logs})
    assert len(text) <= 100
    assert text.startswith("step 1000000/2000000  loss 12.35  ce 1.235e-10  kd 1.235e-10")
    assert line(2, 4, {"eval_loss": 1.5, "eval_kd": 0.5, "eval_runtime": 1.0}) == (
        "step 2/4  evaluation  loss 1.5  kd 0.5"
    )
    assert line(4, 4, {"train_runtime": 1.0, "train_loss": 1.0}) == ""


@pytest.mark.parametrize("progress", [False, True])
def test_the_trainer_writes_short_lines_and_no_dictionaries(tmp_path, capsys, progress):
    trainer = trained(tmp_path, max_steps=1, disable_tqdm=not progress)
    shown = capsys.readouterr().out
    assert re.fullmatch(
        # transformers 4.56 logs the norm of the gradients only if it clips them.
        r"step 1/1  loss \S+  ce \S+  kd \S+  lens \S+  tok/s \S+  lr \S+(  grad \S+)?\n",
        shown,
    )
    names = [type(x).__name__ for x in trainer.callback_handler.callbacks]
    assert ("Progress" if progress else "Lines") in names and "PrinterCallback" not in names


def test_a_card_from_python_names_the_models_in_memory(tmp_path):
    trainer = trained(tmp_path, max_steps=1, kd_ratio=0.0, teacher=False)
    trainer.create_model_card(model_name="ignored")
    text = (tmp_path / "README.md").read_text()
    assert "`a model in memory`, fine-tuned with lens_kernels" in text
    assert "## Objective" not in text and "## Command" not in text


def test_the_commit_of_the_users_folder_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [x for x in os.environ if x.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert provenance.commit() == head.strip()
    (tmp_path / "file").write_text("b")
    assert provenance.commit() == f"{head.strip()}-dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


def test_models_are_hashed_by_content_or_named_by_their_commit(files, hub):
    assert provenance.model_digest("owner/absent") is None
    name = hub(files / "student", "owner/name")
    assert provenance.model_digest(name) == f"commit {'0' * 40}"
    assert re.fullmatch("[0-9a-f]{64}", provenance.model_digest(str(files / "student")))
