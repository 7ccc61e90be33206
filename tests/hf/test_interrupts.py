"""An interrupted call restores the settings of models, tokenizers and torch."""

import copy
import random

import numpy as np
import pytest
import torch

from lens_kernels.backends.triton.tiles.search import nan_in_new_tensors
from lens_kernels.hf import LensObjective
from lens_kernels.hf.evaluation.generation import held_out_ce
from lens_kernels.hf.evaluation.sampling import generate
from lens_kernels.hf.inspection.reading import read
from lens_kernels.hf.model.anatomy import verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.state import evaluating, replaced_forward, without_autocast
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.training import meter
from lens_kernels.hf.training.collation import Collator
from tests.support import tiny
from tests.support.training import STUDENT, TEACHER

IDS = [2, 3, 4, 5, 6]
EXAMPLES = [{"input_ids": IDS, "labels": IDS, "example_id": 0}]


def objective(student, teacher, **options):
    return LensObjective(student, teacher, [1], [2], **options)


def projected(student, teacher, _):
    made = objective(student, teacher, mse_coeff=1.0)
    with made.student_with_projections():
        student(torch.tensor([IDS]))


def replaced(student, *_):
    forward = student.forward
    with replaced_forward(student, lambda *args, **options: forward(*args, **options)):
        student(torch.tensor([IDS]))


def inside(context):
    def run(student, *_):
        with context(student):
            student(torch.tensor([IDS]))

    return run


def batch():
    return [Collator(1)(EXAMPLES)]


CALLS = {
    "evaluate": lambda s, t, _: meter.evaluate(objective(s, t), batch()),
    "objective": lambda s, t, _: objective(s, t)(batch()[0]),
    "projections": projected,
    "shallow_copy": lambda s, *_: shallow_copy(s, [1, 3]),
    "verify_lens": lambda s, *_: verify_lens(s),
    "read": lambda s, *_: read(s, IDS, True, 2),
    "held_out_ce": lambda s, *_: held_out_ce(s, EXAMPLES, Collator(1), 1, progress=False),
    "generate": lambda s, _, tokenizer: generate(
        s, tokenizer, [IDS, IDS[:2]], seed=0, max_new_tokens=2, batch_size=2, progress=False
    ),
    "hidden_states": lambda s, *_: hidden_states(s, [1, 3], {"input_ids": torch.tensor([IDS])}),
    "replaced_forward": replaced,
    "evaluating": inside(evaluating),
    "without_autocast": inside(lambda _: without_autocast(torch.device("cpu"))),
    "nan_in_new_tensors": inside(lambda _: nan_in_new_tensors()),
}


# Calls that draw random weights, so they may change torch's random state.
DRAWS = ("shallow_copy", "projections")


def settings(*models, tokenizer):
    """Return every setting that a call may change while it runs."""
    found = [
        tokenizer.padding_side,
        tokenizer.truncation_side,
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    ]
    for model in models:
        found += [model.config.to_dict(), model.generation_config.to_dict(), list(vars(model))]
        for name, module in model.named_modules():
            found.append((name, module.training, len(module._forward_hooks)))
        found += [(name, x.requires_grad) for name, x in model.named_parameters()]
    return copy.deepcopy(found)


class Interrupt:
    """A forward hook that raises KeyboardInterrupt in a model's n-th forward pass."""

    def __init__(self):
        self.left = 0

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_leaves_every_setting(name):
    student, teacher, tokenizer = tiny.model(**STUDENT), tiny.model(**TEACHER), tiny.tokenizer()
    student.train()
    student.model.layers[0].eval()
    student.model.layers[1].requires_grad_(False)
    # Freeze the teacher before the comparison, because every objective freezes its teacher for
    # good.
    teacher.requires_grad_(False)
    # Call the model once before the comparison. From transformers 5 on, the first call with
    # ``output_hidden_states`` adds hooks that stay.
    student(torch.tensor([IDS]), output_hidden_states=True)
    interrupt = Interrupt()
    student.model.layers[-1].register_forward_pre_hook(interrupt)
    before, drawn = settings(student, teacher, tokenizer=tokenizer), torch.get_rng_state()
    for number in range(1, 20):
        interrupt.left = number
        try:
            CALLS[name](student, teacher, tokenizer)
            ended = True
        except KeyboardInterrupt:
            ended = False
        after = settings(student, teacher, tokenizer=tokenizer)
        assert [x for x, y in zip(after, before, strict=True) if x != y] == [], number
        assert name in DRAWS or torch.equal(torch.get_rng_state(), drawn), number
        if ended:
            break
    assert ended and number > 1
