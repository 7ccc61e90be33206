"""TRL's trainers with a lens train for two steps, with losses that match dense float64 torch."""

import pytest
import torch

from tests.support import tiny
from tests.support.training import STUDENT, TEACHER, assert_same_step

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["ab", "abcd", "b", "dcba", "cc", "abab", "ca", "d"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def completions():
    return [{"prompt": p, "completion": p[::-1] + "x"} for p in PROMPTS]


def messages():
    def said(role, text):
        return {"role": role, "content": text}

    return [{"messages": [said("user", p), said("assistant", p[::-1] + "x")]} for p in PROMPTS]


def make(kind, folder, **options):
    from datasets import Dataset
    from trl import DistillationConfig, SFTConfig
    from trl.experimental.gkd import GKDConfig

    from lens_kernels.hf.integrations import trl

    trainer, config, data, own = {
        "sft": (trl.LensSFTTrainer, SFTConfig, completions(), {}),
        "gkd": (trl.LensGKDTrainer, GKDConfig, messages(), {"max_new_tokens": 4, "lmbda": 0.0}),
        "gkd, student's answers": (
            trl.LensGKDTrainer,
            GKDConfig,
            messages(),
            {"max_new_tokens": 4, "lmbda": 1.0},
        ),
        "distillation": (
            trl.LensDistillationTrainer,
            DistillationConfig,
            [{"prompt": p} for p in PROMPTS],
            {"max_completion_length": 4},
        ),
    }[kind]
    common = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
    }
    args = config(str(folder), **{**common, **own, **options})
    return trainer(
        tiny.model(**STUDENT),
        tiny.model(**TEACHER),
        args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        lens={"num_lens_pairs": 2, "final_divergence": "forward_kl"},
    )


def dense_kl(trainer, batch):
    """Return the forward KL of a batch's labelled tokens, summed, from both models' logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        q, p = (
            model.double()(**inputs).logits[:, :-1].log_softmax(-1)[counted]
            for model in (trainer.lens_objective.student, trainer.lens_objective.teacher)
        )
        trainer.lens_objective.student.float(), trainer.lens_objective.teacher.float()
    return (p.exp() * (p - q)).sum()


KINDS = ["sft", "gkd", "gkd, student's answers", "distillation"]


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_the_lens_loss(kind, tmp_path):
    trainer = make(kind, tmp_path)
    before = {name: x.clone() for name, x in trainer.model.named_parameters()}
    batches = []

    def compare(objective, args, outcome):
        # The student has not changed yet in the first two batches, which come before the first
        # update.
        if len(batches) < 2:
            batches.append((args[0]["labels"], outcome.num_tokens, args[1]))
            torch.testing.assert_close(
                outcome.sums["kd"].double(), dense_kl(trainer, args[0]), rtol=1e-4, atol=1e-6
            )

    trainer.lens_objective.register_forward_hook(compare)
    trainer.train()
    for labels, tokens, denominator in batches:
        assert 0 < tokens == (labels[:, 1:] != -100).sum()
        if "gkd" in kind:
            assert denominator is None, "TRL counted the tokens of the data, not of the answers"
        else:
            assert denominator == sum(tokens for _, tokens, _ in batches)
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == 2
    for log in logs:
        assert {"kd", "lens", "lens_1", "lens_2", "entropy_student_final"} <= log.keys()
        assert log["lens"] > 0
    moved = [n for n, x in trainer.model.named_parameters() if not torch.equal(x, before[n])]
    assert len(moved) == len(before)
    assert not any(x.requires_grad for x in trainer.teacher_model.parameters())


def test_only_answers_are_trained_on(tmp_path):
    trainer = make("distillation", tmp_path)
    seen = []
    trainer.lens_objective.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.train()
    for batch in seen:
        labelled = batch["labels"] != -100
        assert (batch["labels"][labelled] == batch["input_ids"][labelled]).all()
        # Padding is on the left of prompts and on the right of answers, so the labels of a row are
        # contiguous.
        starts = labelled.int().diff(dim=1).eq(1).sum(1)
        assert (starts == 1).all() and labelled.sum(1).le(4).all()
        assert batch["attention_mask"][labelled].all()


def test_accumulated_batches_equal_one_batch(tmp_path):
    weights, logs = [], []
    for batch, accumulate in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        options |= {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
        trainer = make("sft", tmp_path, **options)
        start = {name: x.clone() for name, x in trainer.model.named_parameters()}
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
        logs.append(trainer.state.log_history[0])
    assert_same_step(start, *weights)
    for name in ("loss", "kd", "lens", "lens_1", "ce"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5), name
    assert logs[0]["loss"] == pytest.approx(logs[0]["kd"] + logs[0]["lens"], rel=1e-5)
