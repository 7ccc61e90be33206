"""Everything that is refused: the class of the error, and a message that names what is wrong.

Each case gives what is wrong, the error, and words its message must hold: the argument, what came,
and what was expected.
"""

import itertools
import re

import numpy as np
import pytest
import torch

from lens_kernels import (
    DistillationLoss,
    LensHead,
    LensNorm,
    SymmetricLensLoss,
    distillation_loss,
    symmetric_lens_loss,
)

NAN, INF = float("nan"), float("inf")

S, T = torch.randn(3, 4), torch.randn(3, 5)
W_S, W_T = torch.randn(7, 4), torch.randn(7, 5)
LABELS = torch.tensor([1, 2, -100])


def op(student=S, teacher=T, student_head=W_S, teacher_head=W_T, **options):
    return symmetric_lens_loss(student, teacher, student_head, teacher_head, **options)


def objective(student=(S,), teacher=(T,), student_final=S, teacher_final=T, **options):
    heads = options.pop("student_head", W_S), options.pop("teacher_head", W_T)
    finals = {"student_final": student_final, "teacher_final": teacher_final}
    return distillation_loss(student, teacher, *heads, **finals, **options)


def refused(error, words, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_what_is_well_formed_passes():
    assert op().shape == () and op(reduction="none").shape == (1, 3)
    assert objective(labels=LABELS, kd_ratio=0.5).loss.shape == ()


HIDDEN = {
    "none": (None, TypeError, ["tensor", "NoneType"]),
    "numpy": (S.numpy(), TypeError, ["tensor", "ndarray"]),
    "generator": ((x for x in [S]), TypeError, ["list of tensors", "generator"]),
    "dict": ({0: S}, TypeError, ["list of tensors", "dict"]),
    "list of none": ([None], TypeError, ["[0]", "NoneType"]),
    "list of numpy": ([S, S.numpy()], TypeError, ["[1]", "ndarray"]),
    "list of lists": ([[S]], TypeError, ["[0]", "list"]),
    "integers": (S.long(), TypeError, ["floating point", "bfloat16", "int64"]),
    "bool": (S > 0, TypeError, ["floating point", "bool"]),
    "complex": (S.to(torch.complex64), TypeError, ["floating point", "complex64"]),
    "float8": (S.to(torch.float8_e4m3fn), TypeError, ["floating point", "float8_e4m3fn"]),
    "sparse": (S.to_sparse(), TypeError, ["dense", "sparse_coo"]),
    "0-dim": (torch.tensor(1.0), ValueError, ["(..., D)", "()"]),
    "1-dim": (torch.randn(4), ValueError, ["(..., D)", "(4,)"]),
    "width": (torch.randn(3, 6), ValueError, ["6", "(7, "]),
    "width 0": (torch.randn(3, 0), ValueError, ["width 0", "(7, "]),
    "another device": (S.to("meta"), ValueError, ["meta", "cpu", "move"]),
    "float64": (torch.randn(3, 4, dtype=torch.float64), TypeError, ["float64", "convert"]),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_hidden_states(side, case):
    value, error, words = HIDDEN[case]
    if side == "teacher" and isinstance(value, torch.Tensor) and value.shape == S.shape:
        if value.layout is torch.strided:
            value = value.new_zeros(3, 5)
    refused(error, [f"{side}_hidden", *words], op, **{side: value})
    if isinstance(value, torch.Tensor):
        refused(error, [f"{side}_final", *words], objective, **{f"{side}_final": value})


def test_nested_tensors():
    nested = torch.nested.nested_tensor([S, S], layout=torch.jagged)
    refused(TypeError, ["student_hidden", "dense", "nested"], op, nested)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (([], []), ["student_hidden", "empty"]),
        (([S], []), ["teacher_hidden", "empty"]),
        (([S, S], [T]), ["student_hidden", "teacher_hidden", "2 and 1"]),
        (([S, S], T), ["2 and 1"]),
        ((S, torch.randn(4, 5)), ["student_hidden has (3,)", "teacher_hidden has (4,)"]),
        ((S, torch.randn(1, 5)), ["teacher_hidden has (1,)"]),
        ((S, T[None]), ["teacher_hidden has (1, 3)"]),
        (([S, S[:1]], [T, T]), ["student_hidden[0] has (3,)", "student_hidden[1] has (1,)"]),
        (([S, S], [T, T[:2]]), ["teacher_hidden[1] has (2,)"]),
    ],
)
def test_pairs_and_leading_dimensions_are_never_broadcast(pairs, words):
    refused(ValueError, words, op, *pairs)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"student": []}, ValueError, ["pair up", "0 and 1"]),
        ({"student_final": [S]}, TypeError, ["student_final", "list"]),
        ({"teacher_final": None}, TypeError, ["teacher_final", "NoneType"]),
        ({"student_final": torch.randn(4, 4)}, ValueError, ["student_final has (4,)"]),
        ({"teacher_final": torch.randn(1, 5)}, ValueError, ["teacher_final has (1,)"]),
    ],
)
def test_final_hidden_states(options, error, words):
    refused(error, words, objective, **options)


def norm_head(weight=None, bias=None):
    return LensHead(W_S, norm=LensNorm("rms", weight, bias, eps=1e-5))


HEADS = {
    "none": (None, TypeError, ["LensHead", "(V, D)", "NoneType"]),
    "module": (torch.nn.Linear(4, 7), TypeError, ["LensHead", "Linear", "lens_head_from"]),
    "integers": (W_S.long(), TypeError, [".weight", "int64"]),
    "sparse": (W_S.to_sparse(), TypeError, [".weight", "dense", "sparse_coo"]),
    "3-dim": (W_S[None], ValueError, [".weight", "(V, D)", "(1, 7, 4)"]),
    "1-dim": (W_S[0], ValueError, [".weight", "(V, D)", "(4,)"]),
    "transposed": (W_S.T, ValueError, ["width 4", "(4, 7)"]),
    "partitioned": (torch.empty(0), ValueError, [".weight", "(0,)", "gathered"]),
    "width 0": (torch.empty(7, 0), ValueError, [".weight", "(7, 0)"]),
    "bias width": (LensHead(W_S, W_S[0]), ValueError, [".bias", "(7,)", "(4,)"]),
    "bias column": (LensHead(W_S, W_S[:, :1]), ValueError, [".bias", "(7,)", "(7, 1)"]),
    "bias of one": (LensHead(W_S, torch.ones(1)), ValueError, [".bias", "(7,)", "(1,)"]),
    "bias integers": (LensHead(W_S, torch.arange(7)), TypeError, [".bias", "int64"]),
    "bias device": (LensHead(W_S, torch.ones(7, device="meta")), ValueError, [".bias", "meta"]),
    "norm list": (norm_head([1.0] * 4), TypeError, [".norm.weight", "list"]),
    "norm of one": (norm_head(torch.ones(1)), ValueError, [".norm.weight", "(4,)", "(1,)"]),
    "norm bias": (norm_head(None, torch.ones(7)), ValueError, [".norm.bias", "(4,)", "(7,)"]),
    "norm device": (
        norm_head(torch.ones(4, device="meta")),
        ValueError,
        [".norm.weight", "meta", "cpu"],
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case):
    value, error, words = HEADS[case]
    words = [w if not w.startswith(".") else f"student_head{w}" for w in words]
    refused(error, ["student_head", *words], op, student_head=value)
    # The same head of a teacher of the same width.
    swapped = [w.replace("student", "teacher") for w in words]
    refused(error, ["teacher_head", *swapped], op, teacher=S, teacher_head=value)


def test_a_teacher_on_another_device():
    words = ["teacher_head.weight", "meta", "cpu"]
    refused(ValueError, words, op, teacher_head=W_T.to("meta"))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LensHead([[1.0]]), TypeError, ["LensHead.weight", "tensor", "list"]),
        (lambda: LensHead(W_S, [1.0]), TypeError, ["LensHead.bias", "tensor", "list"]),
        (lambda: LensHead(W_S, norm=torch.nn.LayerNorm(4)), TypeError, ["LensNorm", "LayerNorm"]),
        (lambda: LensHead(W_S, scale=0.0), ValueError, ["LensHead.scale", "above 0", "0.0"]),
        (lambda: LensHead(W_S, scale=INF), ValueError, ["LensHead.scale", "finite", "inf"]),
        (lambda: LensHead(W_S, scale=torch.ones(())), TypeError, ["LensHead.scale", "Tensor"]),
        (lambda: LensHead(W_S, softcap=0), ValueError, ["LensHead.softcap", "softcap=None"]),
        (lambda: LensHead(W_S, softcap=True), TypeError, ["LensHead.softcap", "bool"]),
        (lambda: LensNorm("batch", None, eps=0.0), ValueError, ["LensNorm.kind", "batch", "rms"]),
        (lambda: LensNorm(None, None, eps=0.0), ValueError, ["LensNorm.kind", "None", "layer"]),
        (lambda: LensNorm("rms", None), TypeError, ["eps"]),
        (lambda: LensNorm("rms", None, eps=-1.0), ValueError, ["LensNorm.eps", "-1.0"]),
        (lambda: LensNorm("rms", None, eps=NAN), ValueError, ["LensNorm.eps", "nan"]),
        (lambda: LensNorm("rms", None, eps=None), TypeError, ["LensNorm.eps", "NoneType"]),
        (lambda: LensNorm("rms", None, eps=0, offset=INF), ValueError, ["LensNorm.offset", "inf"]),
        (lambda: LensNorm("rms", None, eps=0, offset=True), TypeError, ["LensNorm.offset", "bool"]),
    ],
)
def test_lens_objects(make, error, words):
    refused(error, words, make)


MASKS = {
    "list": ([1, 1, 1], TypeError, ["tensor", "list"]),
    "numpy": (np.ones(3), TypeError, ["tensor", "ndarray"]),
    "2": (torch.tensor([1, 0, 2]), ValueError, ["0 and 1", "1 of 3"]),
    "-1": (torch.tensor([-1, -1, 1]), ValueError, ["0 and 1", "2 of 3"]),
    "half": (torch.tensor([1, 0.5, 0]), ValueError, ["0 and 1", "1 of 3"]),
    "nan": (torch.tensor([1, 0, NAN]), ValueError, ["0 and 1", "1 of 3"]),
    "complex": (torch.ones(3, dtype=torch.complex64), TypeError, ["complex64"]),
    "sparse": (torch.ones(3).to_sparse(), TypeError, ["dense", "sparse_coo"]),
    "column": (torch.ones(3, 1), ValueError, ["(3,)", "(3, 1)", "not broadcast"]),
    "row": (torch.ones(1, 3), ValueError, ["(3,)", "(1, 3)", "all lens pairs share it"]),
    "one": (torch.ones(1), ValueError, ["(3,)", "(1,)"]),
    "scalar": (torch.tensor(True), ValueError, ["(3,)", "()"]),
    "short": (torch.ones(2), ValueError, ["(3,)", "(2,)"]),
    "device": (torch.ones(3, device="meta"), ValueError, ["meta", "cpu"]),
}


@pytest.mark.parametrize("function", [op, objective])
@pytest.mark.parametrize("case", MASKS)
def test_masks(function, case):
    value, error, words = MASKS[case]
    refused(error, ["mask", *words], function, mask=value)


def test_a_mask_of_one_row_is_not_spread_over_the_batch():
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    for shape in ((3,), (1, 3), (2, 1), (6,), (3, 2)):
        refused(ValueError, ["mask", "(2, 3)", str(shape)], op, s, t, mask=torch.ones(shape))


LABEL_CASES = {
    "list": ([1, 2, 3], TypeError, ["a tensor", "list"]),
    "float": (torch.ones(3), TypeError, ["int64 or int32", "float32"]),
    "bool": (torch.ones(3).bool(), TypeError, ["int64 or int32", "bool"]),
    "uint8": (torch.ones(3).byte(), TypeError, ["int64 or int32", "uint8"]),
    "vocabulary": (torch.tensor([1, 2, 7]), ValueError, ["-100", "[0, 7)", "1 of 3"]),
    "negative": (torch.tensor([-1, 2, -2]), ValueError, ["-100", "[0, 7)", "2 of 3"]),
    "shape": (torch.ones(4).long(), ValueError, ["(3,)", "(4,)", "position"]),
    "one": (torch.ones(1).long(), ValueError, ["(3,)", "(1,)"]),
    "device": (LABELS.to("meta"), ValueError, ["meta", "cpu"]),
    "sparse": (LABELS.to_sparse(), TypeError, ["dense", "sparse_coo"]),
}


@pytest.mark.parametrize("case", LABEL_CASES)
def test_labels(case):
    value, error, words = LABEL_CASES[case]
    refused(error, ["labels", *words], objective, labels=value)


def test_labels_beyond_the_vocabulary_prefix():
    labels = torch.tensor([1, 2, 5])
    refused(ValueError, ["labels", "[0, 5)"], objective, labels=labels, vocab_size=5)


def test_vocabularies_that_differ():
    bigger = torch.randn(9, 5)
    words = ["student_head has 7", "teacher_head has 9", "vocab_size=7"]
    refused(ValueError, words, op, teacher_head=bigger)
    for size in (8, 0, -1):
        words = [f"vocab_size={size}", "[1, 7]", "has 7", "has 9"]
        refused(ValueError, words, op, teacher_head=bigger, vocab_size=size)
    for size, kind in ((5.0, "float"), (True, "bool"), ("5", "str")):
        refused(TypeError, ["vocab_size", "int", kind], op, vocab_size=size)


NUMBERS = {"bool": True, "none": None, "text": "1", "tensor": torch.tensor(0.5), "list": [0.5]}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *itertools.product(["beta", "temperature", "kd_ratio", "lens_coeff"], NUMBERS),
        *itertools.product(["denominator"], ["bool", "text", "list"]),  # may be None or a tensor
    ],
)
def test_numbers_that_are_no_numbers(name, case):
    value = NUMBERS[case]
    function = objective if name in ("kd_ratio", "lens_coeff") else op
    kind = type(value).__name__
    refused(TypeError, [name, "number", kind], function, **{name: value})


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, 1.5, NAN, INF])
@pytest.mark.parametrize("function", [op, objective])
def test_beta_is_an_open_interval_and_its_ends_have_names(function, value):
    words = ["beta", "between 0 and 1", str(value), "forward_kl", "reverse_kl"]
    refused(ValueError, words, function, beta=value)
    refused(ValueError, words, function, beta=value, divergence="tvd")


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF])
def test_numbers_out_of_range(value):
    refused(ValueError, ["temperature", "above 0", str(value)], op, temperature=value)
    refused(ValueError, ["denominator", "above 0", str(value)], op, denominator=value)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(2), ValueError, ["one-element", "(2,)"]),
        (torch.ones(0), ValueError, ["one-element", "(0,)"]),
        (torch.tensor(-3), ValueError, ["0 or more"]),
        (torch.tensor(NAN), ValueError, ["0 or more"]),
        (torch.tensor(True), TypeError, ["real number", "bool"]),
        (torch.tensor(1j), TypeError, ["real number", "complex64"]),
        (torch.tensor(1, device="meta"), ValueError, ["meta", "cpu"]),
    ],
)
def test_denominator_tensors(value, error, words):
    refused(error, ["denominator", *words], op, denominator=value)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_denominator_goes_with_the_mean_alone(reduction):
    words = ["denominator", "'mean'", f"'{reduction}'"]
    refused(ValueError, words, op, denominator=3, reduction=reduction)


LAYER_WEIGHTS = {
    "count": ([1.0, 2.0], ValueError, ["one weight for each", "shape (1,)", "(2,)"]),
    "empty": ([], ValueError, ["one weight for each", "shape (1,)", "(0,)"]),
    "number": (1.0, TypeError, ["list of numbers", "float"]),
    "numpy": (np.ones(1), TypeError, ["list of numbers", "ndarray"]),
    "bool": ([True], TypeError, ["[0]", "bool"]),
    "text": (["1"], TypeError, ["[0]", "str"]),
    "tensors": ([torch.tensor(1.0)], TypeError, ["[0]", "Tensor"]),
    "nan": ([NAN], ValueError, ["[0]", "finite", "nan"]),
    "inf": ([-INF], ValueError, ["[0]", "finite", "-inf"]),
    "tensor of 2": (torch.ones(2), ValueError, ["(1,)", "(2,)"]),
    "scalar": (torch.tensor(1.0), ValueError, ["(1,)", "()"]),
    "column": (torch.ones(1, 1), ValueError, ["(1,)", "(1, 1)"]),
    "integers": (torch.ones(1).long(), TypeError, ["floating point", "int64"]),
    "device": (torch.ones(1, device="meta"), ValueError, ["meta", "cpu"]),
}


@pytest.mark.parametrize("function", [op, objective])
@pytest.mark.parametrize("case", LAYER_WEIGHTS)
def test_layer_weights(function, case):
    value, error, words = LAYER_WEIGHTS[case]
    refused(error, ["layer_weights", *words], function, layer_weights=value)


def test_layer_weights_do_not_go_with_none():
    words = ["layer_weights", "'none'"]
    refused(ValueError, words, op, layer_weights=[1.0], reduction="none")


NAMES = {
    "divergence": (op, ["jsd", "jeffreys", "forward_kl", "reverse_kl", "tvd", "hellinger"]),
    "final_divergence": (objective, ["jsd", "forward_kl", "hellinger"]),
    "reduction": (op, ["mean", "sum", "none"]),
    "backend": (op, ["auto", "torch", "triton"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    function, known = NAMES[name]
    for wrong in ("js", "JSD", ""):
        refused(ValueError, [name, repr(wrong), *map(repr, known)], function, **{name: wrong})
    for wrong in (None, 1, ["jsd"]):
        words = [name, "string", type(wrong).__name__]
        refused(TypeError, words, function, **{name: wrong})


def test_workspace_bytes():
    for value in (1e9, True, "1", torch.tensor(1)):
        words = ["workspace_bytes", "int", type(value).__name__]
        refused(TypeError, words, op, workspace_bytes=value)
    for value in (0, -1):
        words = ["workspace_bytes", "at least 1", str(value)]
        refused(ValueError, words, op, workspace_bytes=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF])
def test_kd_ratio_and_lens_coeff(value):
    refused(ValueError, ["kd_ratio", str(value)], objective, labels=LABELS, kd_ratio=value)
    if not value > 1:
        refused(ValueError, ["lens_coeff", str(value)], objective, lens_coeff=value)


def test_cross_entropy_needs_labels():
    refused(ValueError, ["kd_ratio=0.5", "labels"], objective, kd_ratio=0.5)


def test_options_are_keywords_and_known():
    refused(TypeError, ["positional"], symmetric_lens_loss, S, T, W_S, W_T, None)
    refused(TypeError, ["no_such"], op, no_such=1)


@pytest.mark.parametrize("module", [SymmetricLensLoss, DistillationLoss])
def test_modules_check_their_options_when_they_are_made(module):
    refused(TypeError, ["no_such", "temperature"], module, no_such=1)
    refused(TypeError, ["mask"], module, mask=None)
    refused(ValueError, ["divergence", "'js'"], module, divergence="js")
    refused(ValueError, ["beta", "forward_kl"], module, beta=1.0)
    refused(ValueError, ["temperature", "0"], module, temperature=0)
    refused(ValueError, ["grad_threshold", "-1"], module, grad_threshold=-1)
    if module is SymmetricLensLoss:
        refused(ValueError, ["reduction", "'avg'"], module, reduction="avg")
    else:
        refused(ValueError, ["final_divergence", "'kl'"], module, final_divergence="kl")


def test_nothing_is_computed_before_the_last_check(monkeypatch):
    from lens_kernels import operator

    def fail(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(operator, "apply", fail)
    for options in ({"beta": 1.0}, {"temperature": 0}, {"vocab_size": 8}, {"workspace_bytes": 0}):
        with pytest.raises(ValueError, match=re.escape(next(iter(options)))):
            op(**options)


def test_autocast_does_not_let_integers_pass():
    with torch.autocast("cpu", torch.bfloat16):
        loss = op(S.bfloat16(), T.half(), teacher_head=LensHead(W_T.bfloat16()))
        assert torch.isfinite(loss)
        refused(TypeError, ["student_hidden", "int64"], op, S.long())
