"""Every value of every choice of ``lens-kernels train``, seen where it takes effect."""

from __future__ import annotations

import json

import pytest
import torch

from tests import tiny

pytest.importorskip("transformers")
from lens_kernels import cli, dispatch  # noqa: E402
from lens_kernels.hf import run as command  # noqa: E402
from lens_kernels.hf.config import FINAL_NAMES, LensDistillConfig  # noqa: E402
from tests.test_run import arguments, files, weights  # noqa: E402, F401

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


def test_no_choice_is_forgotten_here():
    offered = {}
    for kind in (command.RunConfig, LensDistillConfig):
        for name in kind.__annotations__:
            field = kind.__dataclass_fields__.get(name)
            if field is not None and field.metadata.get("choices"):
                offered[name] = tuple(field.metadata["choices"])
    assert {k: set(v) for k, v in offered.items()} == {k: set(v) for k, v in SEEN_BELOW.items()}


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

    def watched(name, *args):
        chosen = choose(name, *args)
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


@pytest.mark.parametrize("style", SEEN_BELOW["prompt_style"])
def test_prompts_are_made_in_the_style_asked_for(files, tmp_path, monkeypatch, style):  # noqa: F811
    seen = []

    def load(path, tokenizer, *, prompt_style, **_):
        seen.append(prompt_style)
        raise ValueError("enough")

    monkeypatch.setattr(command, "load_examples", load)
    assert cli.main(arguments(files, tmp_path, prompt_style=style)) == 1
    assert seen == [style]


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
