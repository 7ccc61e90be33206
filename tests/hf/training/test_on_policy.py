"""On-policy training, where the student samples the answers that it is trained on."""

import pytest
import torch

from lens_kernels import cli
from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.training import trainer as training
from lens_kernels.hf.training.collation import Collator
from lens_kernels.hf.training.on_policy import answered
from tests.support import tiny
from tests.support.commands import arguments, assert_same_student, interrupt
from tests.support.training import STUDENT, make_trainer


def batch():
    """Return two prompts of 3 and 5 tokens with answers of 2 and 4 tokens."""
    examples = []
    for prompt, answer in ([2, 3, 4], [5, 6]), ([7, 8, 9, 10, 11], [12, 13, 14, 15]):
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Collator(1)(examples)


def test_answers_are_sampled_after_the_prompts_and_end_with_the_end_token(monkeypatch):
    student = tiny.model(**STUDENT).train()
    given, seen = batch(), []
    generate = type(student).generate

    def cut(self, **options):
        assert not self.training
        seen.append(options)
        whole = generate(self, **options)
        whole[0, 7:] = torch.tensor([1, 1])  # id 1 is both the end token and the padding
        return whole

    monkeypatch.setattr(type(student), "generate", cut)
    out = answered(student, given, 1, max_length=9)
    assert student.training
    assert seen[0]["input_ids"].tolist() == [[1, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert seen[0]["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert out["input_ids"][:, :3].tolist() == [[2, 3, 4], [7, 8, 9]]
    lengths = out["attention_mask"].sum(1).tolist()
    assert lengths[0] <= 6 and lengths[1] <= 9
    for ids, labels, start, end in zip(
        out["input_ids"], out["labels"], (3, 5), lengths, strict=True
    ):
        assert labels[:start].tolist() == [-100] * start
        assert labels[start:end].tolist() == ids[start:end].tolist()
        assert labels[end:].tolist() == [-100] * (len(labels) - end)
        assert 1 not in ids[start : end - 1].tolist()
    assert out["input_ids"][0, lengths[0] - 1] == 1


def test_saved_settings_of_generation_do_not_change_the_samples():
    """Many models save a repetition penalty or a top_k. The samples are the student's own."""
    student = tiny.model(**STUDENT)
    settings = student.generation_config
    settings.suppress_tokens, settings.num_beams = [*range(5), *range(6, 64)], 2
    out = answered(student, batch(), 1, max_length=20)
    assert len({*out["labels"].flatten().tolist()} - {-100}) > 3
    assert student.generation_config is settings


def test_hidden_tokens_are_no_prompt_and_rows_without_labels_get_none():
    # The first row is padded on the left. The second is a repeat that fills the last batch.
    ids = torch.tensor([[9, 9, 2, 3, 4], [5, 6, 7, 8, 9]])
    labels = torch.tensor([[-100, -100, -100, -100, 4], [-100] * 5])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    given = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    out = answered(tiny.model(**STUDENT), given, 1, max_length=6)
    assert out["input_ids"][0, :2].tolist() == [2, 3]
    assert (out["labels"][0] != -100).any() and (out["labels"][1] == -100).all()
    with pytest.raises(ValueError, match="on_policy does not support position_ids"):
        answered(tiny.model(**STUDENT), {**given, "position_ids": mask}, 1, max_length=6)


def test_samples_follow_the_students_own_distribution():
    student = tiny.model(**STUDENT)
    ids = torch.tensor([[2, 3, 4, 5]]).expand(4000, -1)
    labels = ids.where(torch.arange(4) == 3, -100)
    answers = answered(student, {"input_ids": ids, "labels": labels}, 0, max_length=4)["input_ids"]
    counted = torch.bincount(answers[:, 3], minlength=64) / 4000
    with torch.no_grad():
        expected = student(ids[:1, :3]).logits[0, -1].softmax(-1)
    assert (counted - expected).abs().sum() / 2 < 0.06


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_batches_with_sampled_answers(tmp_path, monkeypatch, share):
    sampled = []
    own = training.answered
    monkeypatch.setattr(training, "answered", lambda *a: sampled.append(own(*a)) or sampled[-1])
    trainer = make_trainer(tmp_path, max_steps=8, batch=1, on_policy=share, max_length=16, seed=3)
    lengths = []
    objective = trainer.lens_objective
    objective.register_forward_pre_hook(lambda _, args: lengths.append(args[0]["input_ids"]))
    trainer.train()
    assert len(sampled) == {0.0: 0, 1.0: 8}.get(share, len(sampled))
    assert 0 < len(sampled) < 8 or share != 0.5
    assert sum(any(x is y["input_ids"] for y in sampled) for x in lengths) == len(sampled)
    sampled.clear()
    trainer.evaluate()
    assert not sampled


def test_a_resumed_run_with_sampled_answers_ends_with_the_same_student(
    files, tmp_path, monkeypatch
):
    options = {"on_policy": 0.5, "max_length": 32, "save_steps": 1}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupt(monkeypatch, argv, before_step=3)
    assert cli.main(argv) == 0
    assert_same_student(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_cache": "c"},
        {"teacher_targets": "t"},
        {"packing": True},
        {"kd_ratio": 0.0},
        {"on_policy": 1.5},
    ],
)
def test_options_that_sampled_answers_do_not_support(tmp_path, options):
    with pytest.raises(ValueError, match=r"on_policy(=0.5 compares|.* must be .*1)"):
        LensDistillConfig(output_dir=str(tmp_path), use_cpu=True, **{"on_policy": 0.5, **options})
