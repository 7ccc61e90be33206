"""Small calls for tests of error messages, and a function that checks the raised error."""

import pytest
import torch

from lens_kernels import distillation_loss, symmetric_lens_loss

NAN, INF = float("nan"), float("inf")

S, T = torch.randn(3, 4), torch.randn(3, 5)
W_S, W_T = torch.randn(7, 4), torch.randn(7, 5)
LABELS = torch.tensor([1, 2, -100])


def small_op(student=S, teacher=T, student_head=W_S, teacher_head=W_T, **options):
    return symmetric_lens_loss(student, teacher, student_head, teacher_head, **options)


def small_objective(student=(S,), teacher=(T,), student_final=S, teacher_final=T, **options):
    heads = options.pop("student_head", W_S), options.pop("teacher_head", W_T)
    finals = {"student_final": student_final, "teacher_final": teacher_final}
    return distillation_loss(student, teacher, *heads, **finals, **options)


def refused(error, words, function, *args, **kwargs):
    """Fail unless the call raises exactly this class of error, with all ``words`` in the text."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
