"""Every value of every choice of ``lens-kernels train``, seen where it takes effect."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import tiny

pytest.importorskip("transformers")
from lens_kernels import cli, dispatch  # noqa: E402
from lens_kernels.hf.model.loading import load_model  # noqa: E402
from lens_kernels.hf.training import command  # noqa: E402
from lens_kernels.hf.training.config import FINAL_NAMES, LensDistillConfig  # noqa: E402
from tests.hf.training.test_run import arguments, files, weights  # noqa: E402, F401

pytestmark = pytest.mark.hf
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEEN_BELOW = {
    "lens_divergence": ("jsd", "jeffreys", "forward_kl", "reverse_kl", "tvd", "hellinger"),
    "lens_backend": ("auto", "torch", "triton", "reference"),
    "teacher_cache_dtype": ("float32", "bfloat16", "float16"),
    "student_dtype": ("auto", "float32", "bfloat16", "float16"),
    "teacher_dtype": ("auto", "float32", "bfloat16", "float16"),
    "prompt_style": ("alpaca", "chat"),
}
# Options of numbers and layers, each with a value that no run has by default.
CHANGES_THE_LOSS = {
    "student_blocks": {"student_blocks": [1, 3], "num_lens_pairs": 1},
    "max_length": {"max_length": 8},
    "max_prompt_length": {"max_prompt_length": 9},
    "num_lens_pairs": {"num_lens_pairs": 1},
    "student_layers": {"student_layers": [2], "teacher_layers": [1]},
    "teacher_layers": {"student_layers": [2], "teacher_layers": [3]},
    "lens_coeff": {"lens_coeff": 2.0},
    "lens_norm": {"lens_norm": False},
    "beta": {"beta": 0.3},
    "distill_temperature": {"distill_temperature": 2.0},
    "kd_ratio": {"kd_ratio": 0.5},
    "mse_coeff": {"mse_coeff": 0.01},
    "vocab_size": {"vocab_size": 56},
}
SEEN_IN_TEST_RUN = {"student", "train", "teacher", "eval", "output_dir", "logging_steps"} | {
    f"lora_{name}" for name in ("r", "alpha", "dropout", "target_modules")
}
HERE = {"final_divergence", "teacher_cache", "allow_download", "grad_threshold"}


def test_no_choice_is_forgotten_here():
    offered, others = {}, set()
    for kind in (command.RunConfig, LensDistillConfig):
        for name in kind.__annotations__.keys() & kind.__dataclass_fields__.keys():
            choices = kind.__dataclass_fields__[name].metadata.get("choices")
            if choices:
                offered[name] = set(choices)
            else:
                others.add(name)
    assert offered == {k: set(v) for k, v in SEEN_BELOW.items()}
    assert others == SEEN_IN_TEST_RUN | CHANGES_THE_LOSS.keys() | HERE


def train_loss(files, folder, **options):  # noqa: F811
    argv = arguments(files, folder, max_steps=1, save_strategy="no", **options)
    assert cli.main(argv) == 0
    return json.loads((folder / "metrics.json").read_text())["train_loss"]


def distinct(values):
    ordered = sorted(values)
    return all(b - a > 1e-6 * abs(b) for a, b in zip(ordered, ordered[1:], strict=False))


def test_divergences_of_the_lenses_all_differ(files, tmp_path):  # noqa: F811
    names = SEEN_BELOW["lens_divergence"]
    losses = [train_loss(files, tmp_path / name, lens_divergence=name) for name in names]
    assert distinct(losses)


def test_divergences_of_the_final_output_all_differ(files, tmp_path):  # noqa: F811
    given = [*FINAL_NAMES, "0.5*forward_kl + 2*tvd"]
    losses = [
        train_loss(files, tmp_path / str(i), final_divergence=name, num_lens_pairs=0)
        for i, name in enumerate(given)
    ]
    assert distinct(losses)
    by_name = dict(zip(given, losses, strict=True))
    assert by_name[given[-1]] == pytest.approx(
        0.5 * by_name["forward_kl"] + 2 * by_name["tvd"], rel=1e-4
    )


@pytest.mark.parametrize("backend", SEEN_BELOW["lens_backend"])
def test_the_backend_that_is_asked_for_computes_the_loss(files, tmp_path, monkeypatch, backend):  # noqa: F811
    asked = []
    choose = dispatch.choose

    def watched(name, *args, **options):
        chosen = choose(name, *args, **options)
        asked.append((name, chosen.name))
        return chosen

    monkeypatch.setattr(dispatch, "choose", watched)
    loss = train_loss(files, tmp_path / "out", lens_backend=backend)
    used = "torch" if backend == "auto" else backend
    assert set(asked) == {(backend, used)}
    monkeypatch.undo()
    assert loss == pytest.approx(train_loss(files, tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("dtype", SEEN_BELOW["teacher_cache_dtype"])
def test_the_teachers_states_are_kept_in_the_dtype_asked_for(files, tmp_path, dtype):  # noqa: F811
    from safetensors import safe_open

    folder = tmp_path / "cache"
    train_loss(files, tmp_path / "out", teacher_cache=folder, teacher_cache_dtype=dtype)
    (shard,) = folder.glob("train/*.safetensors")
    with safe_open(shard, "pt") as file:
        assert file.get_tensor("final").dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", SEEN_BELOW["student_dtype"])
def test_models_are_read_in_the_dtype_asked_for(files, tmp_path, dtype):  # noqa: F811
    half = tmp_path / "half"
    tiny.model(layers=3, seed=1).to(torch.bfloat16).save_pretrained(half)
    argv = arguments(files, tmp_path, student=half, student_dtype=dtype, teacher=half)
    run, _, _ = command.parse([*argv[1:], "--teacher_dtype", dtype])
    expected = DTYPES.get(dtype, torch.bfloat16)
    assert command._student(run).dtype == expected
    assert command._teacher(run).dtype == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_round_the_loss_of_a_run(files, tmp_path, dtype):  # noqa: F811
    whole = train_loss(files, tmp_path / "whole")
    near = {"rel": 8 * torch.finfo(DTYPES[dtype]).eps}
    # Float16 carries an adapter alone, which begins at nothing.
    adapter = {"lora_r": 2, "lora_target_modules": ["q_proj"]} if dtype == "float16" else {}
    for name, more in (("student_dtype", adapter), ("teacher_dtype", {})):
        loss = train_loss(files, tmp_path / name, **{name: dtype}, **more)
        assert loss == pytest.approx(whole, **near)
        assert loss != pytest.approx(whole, rel=1e-6), name
    saved = set(weights(tmp_path / "teacher_dtype").values())
    assert {x.dtype for x in saved} == {torch.float32}
    trained = {name: x.dtype for name, x in weights(tmp_path / "student_dtype").items()}
    expected = torch.float32 if adapter else torch.bfloat16
    assert {dtype for name, dtype in trained.items() if not adapter or "lora_" in name} == {
        expected
    }


def test_a_student_whose_weights_are_in_float16_is_refused(files, tmp_path, capsys):  # noqa: F811
    assert cli.main(arguments(files, tmp_path, student_dtype="float16")) == 1
    assert "parameters to train in float16" in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()


def test_weights_are_used_as_they_are_where_that_is_asked_for(files, tmp_path):  # noqa: F811
    for name in ("student", "teacher"):
        load_model(str(files / name)).to(torch.bfloat16).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    folders = {"student": tmp_path / "student", "teacher": tmp_path / "teacher"}
    losses = {
        (mine, theirs): train_loss(
            files,
            tmp_path / f"{mine}-{theirs}",
            student_dtype=mine,
            teacher_dtype=theirs,
            **folders,
        )
        for mine, theirs in (
            ("bfloat16", "bfloat16"),
            ("auto", "auto"),
            ("float32", "bfloat16"),
            ("bfloat16", "float32"),
        )
    }
    (first, second, *others) = losses.values()
    assert first == second and first not in others
    assert {x.dtype for x in weights(tmp_path / "auto-auto").values()} == {torch.bfloat16}


def test_prompts_are_made_in_the_style_asked_for(files, tmp_path):  # noqa: F811
    student = tmp_path / "student"
    tiny.model(layers=3, seed=1).save_pretrained(student)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '(' + m.content + ')= ' if m.role == 'user' else m.content }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(student)
    for name, row in (
        ("asked", {"instruction": "sing", "output": "la la"}),
        ("as_it_is", {"prompt": "(sing)= ", "completion": "la la"}),
    ):
        (tmp_path / name).write_text(json.dumps(row))

    def loss(name, style):
        options = {"train": tmp_path / name, "prompt_style": style, "student": student}
        return train_loss(files, tmp_path / f"{name}-{style}", **options)

    chat, alpaca = (loss("asked", style) for style in SEEN_BELOW["prompt_style"][::-1])
    assert chat == pytest.approx(loss("as_it_is", "alpaca"), rel=1e-6)
    assert chat != pytest.approx(alpaca, rel=1e-3)


@pytest.fixture(scope="module")
def plain_loss(files, tmp_path_factory):  # noqa: F811
    return train_loss(files, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", CHANGES_THE_LOSS)
def test_an_option_changes_the_loss_of_a_run(files, tmp_path, plain_loss, name):  # noqa: F811
    loss = train_loss(files, tmp_path / "out", **CHANGES_THE_LOSS[name])
    assert loss != pytest.approx(plain_loss, rel=1e-5)


def test_all_linear_modules_get_an_adapter(files, tmp_path):  # noqa: F811
    train_loss(files, tmp_path, lora_r=2, lora_target_modules=["all-linear"])
    adapted = {name.split(".lora_A")[0] for name in weights(tmp_path) if ".lora_A" in name}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapted) == 3 * len(linear)
    assert {name.rpartition(".")[2] for name in adapted} == set(linear)


@pytest.mark.parametrize("text", ["no", "'no'", "off"])
def test_a_strategy_of_a_file_may_be_no(files, tmp_path, text):  # noqa: F811
    config = tmp_path / "run.yaml"
    config.write_text(f"save_strategy: {text}\neval_strategy: {text}\nlens_norm: {text}\n")
    argv = [*arguments(files, tmp_path / "out")[1:], "--config", str(config)]
    _, args, chosen = command.parse(argv)
    assert (args.save_strategy, args.eval_strategy, args.lens_norm) == ("no", "no", False)
    assert chosen["save_strategy"] == "no"


@pytest.mark.parametrize("download", [False, True])
def test_the_hub_is_asked_only_where_that_is_allowed(files, tmp_path, monkeypatch, download):  # noqa: F811
    seen = []
    load = command.load_model

    def watched(path, dtype, allow):
        seen.append(allow)
        return load(path, dtype, False)

    monkeypatch.setattr(command, "load_model", watched)
    argv = arguments(files, tmp_path, max_steps=1, save_strategy="no")
    assert cli.main([*argv, "--allow_download"] if download else argv) == 0
    assert seen == [download, download]


def test_student_blocks_make_the_student(files, tmp_path):  # noqa: F811
    train_loss(files, tmp_path, student_blocks=[1, 3], num_lens_pairs=1, learning_rate=1e-12)
    start, end = weights(files / "student"), weights(tmp_path)
    for mine, origin in ((0, 0), (1, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        torch.testing.assert_close(end[name.format(mine)], start[name.format(origin)])
    assert "model.layers.2.mlp.up_proj.weight" not in end


def test_a_gradient_threshold_is_used_and_says_what_it_left_out(files, tmp_path):  # noqa: F811
    def dropped(name, **options):
        options |= {"max_steps": 1, "save_steps": 1, "eval": files / "eval.jsonl"}
        assert cli.main(arguments(files, tmp_path / name, **options)) == 0
        state = tmp_path / name / "checkpoint-1" / "trainer_state.json"
        logs = json.loads(state.read_text())["log_history"]
        return [entry["dropped"] for entry in logs if "dropped" in entry]

    assert dropped("exact") == []
    whole = {"grad_threshold": 1000}
    assert (
        dropped("all", **whole) == dropped("two", gradient_accumulation_steps=2, **whole) == [1.0]
    )
    (few,), (some,) = dropped("few", grad_threshold="bf16"), dropped("some", grad_threshold=1e-2)
    assert 0.0 <= few < 1e-3 < some < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_threshold": "fp8"}, "grad_threshold='fp8' is unknown; choose one of 'bf16'"),
        ({"grad_threshold": "-1"}, "grad_threshold must be finite and lie in"),
        ({"grad_threshold": 1e-6, "lens_backend": "reference"}, "'reference' is exact"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused_before_a_model_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LensDistillConfig(output_dir=str(tmp_path), **options)
