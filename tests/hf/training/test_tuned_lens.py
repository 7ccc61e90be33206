"""Tuned lenses: translators before the norm, trained to predict the model's own output."""

from dataclasses import replace

import pytest
import torch

from lens_kernels import LensHead, LensTranslator, symmetric_lens_loss
from lens_kernels.cli import main
from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.training.translators import load_translators, save_translators
from tests.support import tiny
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH
from tests.support.problems import make, ours
from tests.support.training import make_trainer, trained

WIDTH = BATCH.student


def translators(number=BATCH.pairs, width=WIDTH):
    """Return random translators whose tensors require gradients."""
    made = []
    for _ in range(number):
        weight, bias = torch.randn(width, width) / width, torch.randn(width)
        made.append(LensTranslator(weight.requires_grad_(), bias.requires_grad_()))
    return made


def test_zeros_change_nothing():
    problem = make(BATCH, norm="rms", bias=True)
    expected, grads = ours(problem)
    zeros = LensTranslator.zeros(WIDTH)
    problem.student_head = replace(problem.student_head, translator=zeros)
    loss, got = ours(problem)
    assert torch.equal(loss, expected)
    assert_gradients(got, {name: x.double() for name, x in grads.items()}, 1e-6)


def test_loss_and_gradients_are_those_of_translated_states():
    problem, made = make(BATCH, norm="layer", norm_bias=True), translators()
    students, teachers, head, teacher_head = problem.args()
    lens = replace(head, translator=made)
    loss = symmetric_lens_loss(students, teachers, lens, teacher_head)
    leaves = [*students, head.weight, *(x for t in made for x in (t.weight, t.bias))]
    grads = torch.autograd.grad(loss, leaves)
    moved = [h + h @ t.weight.T + t.bias for h, t in zip(students, made, strict=True)]
    expected = symmetric_lens_loss(moved, teachers, head, teacher_head)
    assert_close(loss, expected.double(), 1e-6)
    for grad, truth in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert_close(grad, truth.double(), 1e-5)


def test_a_teachers_translator_gets_no_gradient():
    problem, made = make(BATCH), translators(width=BATCH.teacher)
    plain = ours(problem)[0]
    problem.teacher_head = replace(problem.teacher_head, translator=made)
    loss, _ = ours(problem)
    assert loss != plain
    found = torch.autograd.grad(
        symmetric_lens_loss(*problem.args()), made[0].weight, allow_unused=True
    )
    assert found == (None,)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"LensTranslator.weight must be \(D, D\) and bias \(D,\)"):
        LensTranslator(torch.ones(3, 4), torch.ones(3))
    problem = make(BATCH)
    module = torch.nn.Linear(WIDTH, WIDTH)
    for wrong in (module, [module] * BATCH.pairs, "x"):
        with pytest.raises(TypeError, match="translator must hold LensTranslators, got"):
            replace(problem.student_head, translator=wrong)
    for made, message in (
        (translators(1), "has 1 translators for 2 lens pairs"),
        (translators(width=5), "has width 5, but the hidden states have width 33"),
    ):
        problem.student_head = replace(problem.student_head, translator=made)
        with pytest.raises(ValueError, match=message):
            ours(problem)


def test_the_command_trains_lenses_that_predict_better(files, tmp_path, capsys):
    output = tmp_path / "lens.safetensors"
    words = ["--model", files / "teacher", "--data", files / "train.jsonl", "--output", output]
    words += ["--layers", 1, 3, "--steps", 60, "--learning-rate", 0.01]
    assert main(["tune-lens", *map(str, words)]) == 0
    made = load_translators(output)
    assert [*made] == [1, 3]
    lines = [x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("layer")]
    assert [(x[0], x[1]) for x in lines] == [("layer", "1:"), ("layer", "3:")]
    for x in lines:
        assert float(x[6]) < 0.8 * float(x[4])
    before = output.read_bytes()
    tiny.model(layers=1).save_pretrained(tmp_path / "one")
    tiny.tokenizer().save_pretrained(tmp_path / "one")
    for bad, message in (
        (["--layers", 4], "layers must lie in [1, 3], got 4"),
        (["--layers", 1, 1], "layers must differ, got [1, 1]"),
        (["--model", tmp_path / "one"], "has one block, and no layer before it"),
        (["--output", tmp_path], "is a folder: give the name of a file"),
        (["--steps", 2, "--learning-rate", 1e37], "are not finite after 2 steps, so they are not"),
    ):
        assert main(["tune-lens", *map(str, [*words[:6], *bad])]) == 1
        assert message in capsys.readouterr().err
    assert output.read_bytes() == before and not [*tmp_path.parent.glob("*.partial")]


def test_files_of_both_layouts(tmp_path):
    made = dict(zip((2, 5), translators(), strict=True))
    save_translators(tmp_path / "own.safetensors", made)
    # The package tuned-lens saves a state dict of the translators, with names such as ``0.weight``.
    state = {f"{i}.{part}": getattr(x, part).detach() for i, x in made.items() for part in PARTS}
    torch.save(state, tmp_path / "params.pt")
    for path in (tmp_path / "own.safetensors", tmp_path):
        found = load_translators(path)
        assert [*found] == [2, 5]
        for depth, x in made.items():
            assert all(torch.equal(getattr(found[depth], part), getattr(x, part)) for part in PARTS)
    torch.save({"2.weight": torch.ones(2, 2)}, tmp_path / "params.pt")
    with pytest.raises(ValueError, match="lacks a weight or a bias of a translator"):
        load_translators(tmp_path)
    torch.save({"head": torch.ones(2, 2)}, tmp_path / "params.pt")
    with pytest.raises(ValueError, match="holds 'layer_head', which is no part of a translator"):
        load_translators(tmp_path)
    torch.save([torch.ones(2, 2)], tmp_path / "params.pt")
    with pytest.raises(ValueError, match="params.pt holds a list, not tensors by their names"):
        load_translators(tmp_path)
    (tmp_path / "params.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="params.pt is no file of tensors that torch saved"):
        load_translators(tmp_path)
    (tmp_path / "own.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no safetensors file of translators"):
        load_translators(tmp_path / "own.safetensors")


PARTS = ("weight", "bias")


def test_a_head_alone_may_have_one_translator_for_all_pairs():
    problem, made = make(BATCH), translators(1)
    both = replace(problem.student_head, translator=made * 2)
    one = LensHead(problem.student_head.weight, translator=made[0])
    rest = problem.student_hidden, problem.teacher_hidden
    losses = [symmetric_lens_loss(*rest, x, problem.teacher_head) for x in (both, one)]
    assert torch.equal(*losses)


@pytest.fixture(scope="module")
def lens_files(tmp_path_factory):
    """Return files of random translators for the layers of the tiny student and teacher."""
    torch.manual_seed(0)  # module fixtures are made before the seed of a test is set
    folder, made = tmp_path_factory.mktemp("lens"), {}
    for side, layers, width in (("student", (1, 2), 16), ("teacher", (1, 3), 24)):
        pairs = zip(layers, translators(2, width), strict=True)
        save_translators(folder / side, dict(pairs))
        made[f"{side}_lens"] = str(folder / side)
    return made


def test_the_trainer_reads_layers_through_translators(tmp_path, lens_files):
    plain, moved = (trained(tmp_path, max_steps=1, **more) for more in ({}, lens_files))
    one, other = (x.state.log_history[0] for x in (plain, moved))
    assert one["kd"] == other["kd"]
    assert one["lens"] != pytest.approx(other["lens"], rel=1e-4)
    assert one["entropy_teacher_3"] != other["entropy_teacher_3"]
    zeros = trained(tmp_path, max_steps=1, train_student_lens=True)
    assert zeros.state.log_history[0]["lens"] == pytest.approx(one["lens"], rel=1e-6)
    assert all(x.abs().max() > 0 for x in zeros.lens_objective.projections.parameters())
    held = load_translators(lens_files["student_lens"])
    along = trained(tmp_path, max_steps=1, train_student_lens=True, **lens_files)
    assert along.state.log_history[0]["lens"] == pytest.approx(other["lens"], rel=1e-6)
    for module, start in zip(along.lens_objective.projections, held.values(), strict=True):
        assert (module.weight - start.weight).abs().max() > 1e-6


def test_a_resumed_run_continues_with_its_translators(tmp_path):
    options = {"train_student_lens": True, "mse_coeff": 0.1, "learning_rate": 0.05}
    options |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "a", **options)
    resumed = make_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for one, other in zip(
        whole.lens_objective.projections.parameters(),
        resumed.lens_objective.projections.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("without", [{"num_lens_pairs": 0}, {"kd_ratio": 0.0}])
def test_translators_without_lens_pairs_are_refused(tmp_path, without):
    for option in ({"teacher_lens": "x"}, {"train_student_lens": True}):
        with pytest.raises(ValueError, match="has no effect without lens pairs"):
            LensDistillConfig(output_dir=str(tmp_path), use_cpu=True, **option, **without)
    layers = {"student_layers": [1], "teacher_layers": [1], "num_lens_pairs": 0}
    LensDistillConfig(output_dir=str(tmp_path), use_cpu=True, teacher_lens="x", **layers)


def test_files_of_other_layers_or_models_are_refused(tmp_path, lens_files):
    with pytest.raises(ValueError, match=r"for layers \[1, 3\], but not for \[2\]"):
        make_trainer(tmp_path, student_lens=lens_files["teacher_lens"])
    with pytest.raises(ValueError, match="has width 24 in layer 1, but the hidden states have"):
        make_trainer(
            tmp_path, student_lens=lens_files["teacher_lens"], num_lens_pairs=None,
            student_layers=[1], teacher_layers=[1],
        )  # fmt: skip
