"""The command ``lens-kernels train`` on tiny models: options, files and errors."""

import json
import re
from dataclasses import fields

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lens_kernels import cli
from lens_kernels.hf import LensDistillConfig, uniform_layers
from lens_kernels.hf.model.loading import load_model
from lens_kernels.hf.training import command
from tests.support.commands import arguments, assert_same_student, weights, write_rows


def test_train_writes_the_student_its_options_and_its_history(files, tmp_path, capsys, pictures):
    argv = arguments(files, tmp_path, eval_data=files / "eval.jsonl", report_to="tensorboard")
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    for expected in ("train: 7 rows", "eval: 2 rows", "[1, 2] and [1, 3]", "eval_lens_1"):
        assert expected in shown
    start, end = weights(files / "student"), weights(tmp_path)
    assert any((end[name] - start[name]).abs().max() > 1e-3 for name in start)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd"] + metrics["eval_lens"])
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    record = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert record["max_steps"] == 4 and record["learning_rate"] == 0.01
    # run.yaml contains only options that the user gave.
    assert "beta" not in record
    # Training writes the first event file, and the final evaluation writes the second.
    events = min(tmp_path.glob("**/events.out.tfevents.*"))
    reader = EventAccumulator(str(events))
    reader.Reload()
    for tag in ("ce", "kd", "lens_1", "lens_2", "entropy_teacher_final", "tokens_per_second"):
        assert len(reader.Scalars(f"train/{tag}")) == 4


def test_recorded_options_reproduce_the_student(files, tmp_path):
    assert cli.main(arguments(files, tmp_path / "one", seed=3)) == 0
    again = ["train", "--config", str(tmp_path / "one" / "run.yaml")]
    assert cli.main([*again, "--output", str(tmp_path / "two")]) == 0
    assert_same_student(tmp_path / "one", tmp_path / "two")


def test_bad_data_stops_the_run_before_any_model_is_loaded(files, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((files / "train.jsonl").read_text() + '{"prompt": "x"}\n')
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was read"))
    assert cli.main(arguments(files, tmp_path / "out", data=bad)) == 1
    assert "bad.jsonl:8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("other", "different ids for 3 tokens: "),
        ("none", "none' cannot be read: .*allow_download"),
    ],
)
def test_train_refuses_mismatched_and_missing_models(files, tmp_path, capsys, teacher, message):
    assert cli.main(arguments(files, tmp_path / "out", teacher=files / teacher)) == 1
    assert re.search(message, capsys.readouterr().err)


def test_tokenizers_may_differ_above_the_shared_vocabulary(files, tmp_path, capsys):
    options = {"teacher": files / "other", "vocab_size": 60, "max_steps": 1}
    assert cli.main(arguments(files, tmp_path / "out", **options)) == 0
    write_rows(tmp_path / "data", [{"prompt": "a (b", "completion": "c"}])
    argv = arguments(files, tmp_path / "again", data=tmp_path / "data", **options)
    assert cli.main(argv) == 1
    assert "'(' (student 60, teacher None)" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_lora_trains_only_the_adapter(files, tmp_path):
    options = {"lora_r": 2, "lora_alpha": 5, "lora_dropout": 0.25, "max_steps": 6}
    targets = ["q_proj", "down_proj"]
    assert cli.main(arguments(files, tmp_path, lora_target_modules=targets, **options)) == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5, 0.25)
    assert set(config["target_modules"]) == set(targets)
    trained, start = load_model(str(tmp_path)), weights(files / "student")
    for name, x in trained.get_base_model().state_dict().items():
        assert "lora_" in name or torch.equal(x, start[name.replace("base_layer.", "")]), name
    moved = [x.abs().max() for name, x in trained.named_parameters() if "lora_B" in name]
    # There are six adapted modules: two in each of three blocks.
    assert len(moved) == 6 and min(moved) > 0


def test_an_adapter_can_be_the_student_and_the_teacher(files, tmp_path, capsys):
    argv = arguments(files, tmp_path / "one", lora_r=2, lora_target_modules=["q_proj"])
    assert cli.main(argv) == 0
    again = {"student": tmp_path / "one"}
    assert cli.main(arguments(files, tmp_path / "two", **again)) == 0
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("lora_" in name for name in moved)
    assert cli.main(arguments(files, tmp_path / "taught", teacher=tmp_path / "one")) == 0
    assert cli.main(arguments(files, tmp_path / "three", lora_r=2, **again)) == 1
    assert "lora_r=2 would add a second adapter to" in capsys.readouterr().err


def test_command_line_options_override_the_file(files, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.25\nstudent_layers: [1]\nteacher_layers: [2]\nlens_norm: false\n")
    argv = arguments(files, tmp_path, num_lens_pairs=None, config=config, beta=0.75)[1:]
    _, args, chosen = command.parse(argv)
    assert (args.beta, args.student_layers, args.lens_norm) == (0.75, [1], False)
    assert chosen["beta"] == 0.75 and chosen["lens_norm"] is False
    assert chosen["output_dir"] == str(tmp_path)


def test_recorded_options_are_plain_values(files, tmp_path):
    argv = arguments(files, tmp_path, debug=["underflow_overflow"])[1:]
    _, _, chosen = command.parse(argv)
    assert yaml.safe_load(yaml.safe_dump(chosen))["debug"] == ["underflow_overflow"]


def test_no_file_or_variable_sets_an_option_unseen(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    (tmp_path / "train.args").write_text("--beta 0.25")
    argv = arguments(files, tmp_path)[1:]
    # accelerate's launcher always sets this variable. The value NO is accepted, because it has no
    # effect.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    _, args, chosen = command.parse(argv)
    assert args.beta == 0.5 and "beta" not in chosen
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert command.parse([*argv, "--bf16"])[2]["bf16"] is True
    with pytest.raises(SystemExit):
        command.parse(argv)
    assert "give --bf16 as an option, and unset it" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(SystemExit):
        command.parse([*argv, "--bf16"])
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in capsys.readouterr().err


def test_no_file_of_a_run_holds_a_secret(files, tmp_path):
    names = [x.name for x in fields(LensDistillConfig) if x.name.endswith("_token")]
    assert "hub_token" in names
    secrets = {name: f"hf_secret_{name}" for name in names}
    _, args, _ = command.parse(arguments(files, tmp_path, **secrets)[1:])
    assert args.hub_token in secrets.values()
    assert cli.main(arguments(files, tmp_path, max_steps=2, **secrets)) == 0
    written = [x for x in tmp_path.rglob("*") if x.is_file()]
    assert {"run.yaml", "training_args.bin"} < {x.name for x in written}
    assert not [x for x in written if b"hf_secret" in x.read_bytes()]
    (kept,) = tmp_path.glob("checkpoint-2/training_args.bin")
    kept = torch.load(kept, weights_only=False)
    assert (kept.hub_token, kept.learning_rate) == (None, 0.01)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("conf", "--conf is not an option; did you mean --config?"),
        ("pres", "--pres is not an option; did you mean --preset?"),
        ("resume_from_checkpoint", "resumes from the last complete checkpoint"),
    ],
)
def test_options_without_effect_are_refused(files, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        command.parse(arguments(files, tmp_path, **{option: "x"})[1:])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "'lerning_rate' is not an option; did you mean --learning_rate?"),
        ("- a", "expected options as 'name: value', got a list"),
        ("a: [", "not YAML"),
        ("a: " + "[" * 5000, "not YAML"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size must be finite and lie in"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps must be finite and lie in"),
        ("learning_rate: .nan", "learning_rate must be finite"),
        ("num_train_epochs: .nan", "num_train_epochs must be finite"),
        ("seed: -1", "seed must be finite and lie in"),
        ("shuffle_buffer: -1", "shuffle_buffer must be finite and lie in"),
        ("logging_steps: .nan", "logging_steps must be finite and lie above 0"),
        ("save_steps: 0", "save_steps must be finite and lie above 0"),
        ("max_grad_norm: .nan", "max_grad_norm must be finite"),
        ("beta: 2", "beta must be finite and lie between 0 and 1"),
        ("beta: many", "argument --beta: invalid float value"),
        ("lens_divergence: kl", "invalid choice: 'kl'"),
    ],
    ids=["unknown", "list", "open", "nested", "batch", "accumulation", "rate", "epochs"]
    + ["seed", "buffer", "logging", "save", "clipping", "beta", "text", "choice"],
)
def test_bad_options_files_are_refused(files, tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        given = "per_device_train_batch_size", "learning_rate", "logging_steps", "save_steps"
        less = dict.fromkeys(given)
        command.parse(arguments(files, tmp_path, config=tmp_path / "run.yaml", **less)[1:])
    assert message in capsys.readouterr().err


def test_a_file_in_another_encoding_and_an_unknown_preset_are_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"beta: \xff")
    for argv in (["--config", str(tmp_path / "run.yaml")], ["--preset", "none"]):
        with pytest.raises(SystemExit):
            command.parse(argv)
        shown = capsys.readouterr().err
        assert shown.startswith("lens-kernels train: ") and argv[0] in shown


@pytest.mark.parametrize(
    ("preset", "pairs", "blocks"),
    [
        ("gpt2", 5, (12, 48)),
        ("gpt2-medium", 5, (24, 48)),
        ("tinyllama", 5, (22, 32)),
        ("qwen2.5", 4, (28, 36)),
    ],
)
def test_presets_use_the_layers_of_the_paper(files, tmp_path, preset, pairs, blocks):
    less = dict.fromkeys(("num_lens_pairs", "use_cpu", "learning_rate"))
    run, args, _ = command.parse(arguments(files, tmp_path, preset=preset, bf16=False, **less)[1:])
    student, teacher = (uniform_layers(pairs, n) for n in blocks)
    # In the paper, the layers of TinyLlama's teacher are rounded down.
    if preset == "tinyllama":
        teacher = [i * 32 // 6 for i in range(1, 6)]
    assert (args.student_layers, args.teacher_layers) == (student, teacher)
    assert (args.kd_ratio, args.lens_coeff, args.final_divergence) == (1.0, 1.0, "reverse_kl")
    assert args.lr_scheduler_type == "cosine" and 0 < args.learning_rate < 1e-3
    assert (run.lora_r == 8) == (preset == "qwen2.5")
    assert preset in command.presets()


def test_the_preset_of_the_study_sets_only_the_objective(files, tmp_path):
    plain, args = (
        command.parse(arguments(files, tmp_path, preset=x)[1:])[1].objective_options()
        for x in (None, "forward_kl")
    )
    changed = {"final_divergence": "forward_kl", "divergence": "forward_kl"}
    assert args == {**plain, **changed} != plain


def shown_help(word, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", word])
    return re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)


def test_the_short_help_shows_all_own_options_and_few_of_the_trainer(capsys):
    own = {"--help", "--help_all", "--config", "--preset", "--output"}
    for kind in (command.RunConfig, LensDistillConfig):
        for option in fields(kind):
            if option.name in kind.__annotations__:
                assert option.metadata["help"], option.name
                own |= {f"--{option.name}"} - {"--output_dir"}
    short, long = shown_help("--help", capsys), shown_help("--help-all", capsys)
    assert own <= {*short} <= {*long} and len(short) == len({*short}) < len(own) + 20
    public = {f"--{x.name}" for x in fields(LensDistillConfig) if not x.name.startswith("_")}
    assert {*long} == own | public - {"--output_dir"}
