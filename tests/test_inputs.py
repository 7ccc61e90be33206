"""Invalid inputs raise an error of the right class, with a message that names the problem.

Each case gives the invalid value, the class of the error, and words that the message must contain:
the argument, the passed value, and the allowed values.
"""

import re

import numpy as np
import pytest
import torch

from lens_kernels import DistillationLoss, LensHead, LensNorm, SymmetricLensLoss, operator
from lens_kernels import symmetric_lens_loss as lens_loss
from tests.support.refusals import INF, LABELS, NAN, W_S, W_T, S, T, refused
from tests.support.refusals import small_objective as objective
from tests.support.refusals import small_op as op


def test_valid_inputs_are_accepted():
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
    "nested": (torch.nested.nested_tensor([S], layout=torch.jagged), TypeError, ["dense"]),
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
    # The value is also invalid as the teacher's head. The teacher has the student's hidden size.
    swapped = [w.replace("student", "teacher") for w in words]
    refused(error, ["teacher_head", *swapped], op, teacher=S, teacher_head=value)


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


def number(*values):
    """Return a case for each of ``values``, by the name of its type. None of them is a number."""
    return {type(x).__name__: (x, TypeError, ["number", type(x).__name__]) for x in values}


def outside(words, *values):
    """Return a case for each of ``values``, which lie outside the allowed range."""
    return {str(x): (x, ValueError, [*words, str(x)]) for x in values}


def unknown(*known):
    """Return cases of unknown names, with ``known`` as the allowed names.

    Values that are not strings are also cases.
    """
    cases = {f"{x!r}": (x, ValueError, [f"{x!r}", *map(repr, known)]) for x in ("js", "JSD", "")}
    others = (None, 1, ["jsd"])
    return cases | {str(x): (x, TypeError, ["string", type(x).__name__]) for x in others}


NO_NUMBERS = number(True, None, "1", torch.tensor(0.5), [0.5])
DIVERGENCES = ["jsd", "jeffreys", "forward_kl", "reverse_kl", "tvd", "hellinger"]
# Values that are invalid in any call.
ARGUMENTS = {
    "mask": {
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
        "device": (torch.ones(3, device="meta"), ValueError, ["meta", "cpu"]),
    },
    "labels": {
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
    },
    "layer_weights": {
        "count": ([1.0, 2.0], ValueError, ["(1,)", "got shape (2,)"]),
        "empty": ([], ValueError, ["(1,)", "got shape (0,)"]),
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
    },
    "denominator": {
        # NO_NUMBERS does not fit here, because None and tensors are valid denominators.
        **number(True, "1", [0.5]),
        **outside(["above 0"], 0, -1.0, NAN, INF),
        "two": (torch.ones(2), ValueError, ["one-element", "(2,)"]),
        "no element": (torch.ones(0), ValueError, ["one-element", "(0,)"]),
        "negative tensor": (torch.tensor(-3), ValueError, ["0 or more"]),
        "nan tensor": (torch.tensor(NAN), ValueError, ["0 or more"]),
        "bool tensor": (torch.tensor(True), TypeError, ["real number", "bool"]),
        "complex": (torch.tensor(1j), TypeError, ["real number", "complex64"]),
        "device": (torch.tensor(1, device="meta"), ValueError, ["meta", "cpu"]),
    },
    # 0 and 1 are invalid, because they give other divergences, which have their own names.
    "beta": NO_NUMBERS
    | outside(["between 0 and 1", "forward_kl", "reverse_kl"], 0, 1, 0.0, 1.0, -0.1, 1.5, NAN, INF),
    "temperature": NO_NUMBERS | outside(["above 0"], 0, -1.0, NAN, INF),
    "kd_ratio": NO_NUMBERS | outside([], -0.1, 1.1, NAN, INF),
    "lens_coeff": NO_NUMBERS | outside([], -0.1, NAN, INF),
    "vocab_size": {
        "float": (5.0, TypeError, ["int", "float"]),
        "bool": (True, TypeError, ["int", "bool"]),
        "text": ("5", TypeError, ["int", "str"]),
    },
    "workspace_bytes": {
        "float": (1e9, TypeError, ["int", "float"]),
        "bool": (True, TypeError, ["int", "bool"]),
        "text": ("1", TypeError, ["int", "str"]),
        "tensor": (torch.tensor(1), TypeError, ["int", "Tensor"]),
        **outside(["at least 1"], 0, -1),
    },
    "grad_threshold": {
        **outside(["must be finite"], -1e-6, NAN, INF),
        "list": ([1e-6], TypeError, ["must be a number, got list, or one of"]),
        "name": ("fp8", ValueError, ["'fp8' is unknown; choose one of 'bf16'"]),
    },
    "divergence": unknown(*DIVERGENCES),
    "final_divergence": {"js": ("js", ValueError, ["'js'", *map(repr, DIVERGENCES)])},
    "reduction": unknown("mean", "sum", "none"),
    "backend": unknown("auto", "torch", "triton"),
}
OF_ONE = {"reduction": [op]} | dict.fromkeys(
    ["labels", "kd_ratio", "lens_coeff", "final_divergence"], [objective]
)


@pytest.mark.parametrize(
    ("argument", "case"), [(name, case) for name, cases in ARGUMENTS.items() for case in cases]
)
def test_arguments(argument, case):
    value, error, words = ARGUMENTS[argument][case]
    for function in OF_ONE.get(argument, [op, objective]):
        refused(error, [argument, *words], function, **{argument: value})


BIGGER = {"teacher_head": torch.randn(9, 5)}
# Combinations of arguments that are invalid, although each argument is valid alone.
TOGETHER = [
    (objective, {"student": []}, ["pair up", "0 and 1"]),
    (objective, {"student_final": torch.randn(4, 4)}, ["student_final has (4,)"]),
    (objective, {"teacher_final": torch.randn(1, 5)}, ["teacher_final has (1,)"]),
    (objective, {"kd_ratio": 0.5}, ["kd_ratio=0.5", "labels"]),
    (objective, {"labels": torch.tensor([1, 2, 5]), "vocab_size": 5}, ["labels", "[0, 5)"]),
    (op, {"beta": 1.0, "divergence": "tvd"}, ["beta", "between 0 and 1"]),
    (op, {"denominator": 3, "reduction": "sum"}, ["denominator", "'mean'", "'sum'"]),
    (op, {"denominator": 3, "reduction": "none"}, ["denominator", "'mean'", "'none'"]),
    (op, {"layer_weights": [1.0], "reduction": "none"}, ["layer_weights", "'none'"]),
    (op, {"teacher_head": W_T.to("meta")}, ["teacher_head.weight", "meta", "cpu"]),
    (op, BIGGER, ["student_head has 7", "teacher_head has 9", "vocab_size=7"]),
    *(
        (op, BIGGER | {"vocab_size": n}, [f"vocab_size={n}", "[1, 7]", "has 7", "has 9"])
        for n in (8, 0, -1)
    ),
]


@pytest.mark.parametrize(("function", "options", "words"), TOGETHER)
def test_arguments_that_do_not_go_together(function, options, words):
    refused(ValueError, words, function, **options)


@pytest.mark.parametrize("side", ["student_final", "teacher_final"])
@pytest.mark.parametrize("value", [[S], None])
def test_final_hidden_states_are_tensors(side, value):
    refused(TypeError, [side, type(value).__name__], objective, **{side: value})


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (6,), (3, 2)])
def test_a_mask_is_never_broadcast(shape):
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    refused(ValueError, ["mask", "(2, 3)", str(shape)], op, s, t, mask=torch.ones(shape))


def test_options_must_be_known_keywords():
    refused(TypeError, ["positional"], lens_loss, S, T, W_S, W_T, None)
    refused(TypeError, ["no_such"], op, no_such=1)


@pytest.mark.parametrize(
    ("modules", "error", "words", "options"),
    [
        ("both", TypeError, ["no_such", "temperature"], {"no_such": 1}),
        ("both", TypeError, ["mask"], {"mask": None}),
        ("both", ValueError, ["divergence", "'js'"], {"divergence": "js"}),
        ("both", ValueError, ["beta", "forward_kl"], {"beta": 1.0}),
        ("both", ValueError, ["temperature", "0"], {"temperature": 0}),
        ("both", ValueError, ["grad_threshold", "-1"], {"grad_threshold": -1}),
        (SymmetricLensLoss, ValueError, ["reduction", "'avg'"], {"reduction": "avg"}),
        (DistillationLoss, ValueError, ["final_divergence", "'kl'"], {"final_divergence": "kl"}),
    ],
)
def test_modules_check_their_options_when_they_are_made(modules, error, words, options):
    for module in [SymmetricLensLoss, DistillationLoss] if modules == "both" else [modules]:
        refused(error, words, module, **options)


@pytest.mark.parametrize(
    "options", [{"beta": 1.0}, {"temperature": 0}, {"vocab_size": 8}, {"workspace_bytes": 0}]
)
def test_nothing_is_computed_before_the_last_check(monkeypatch, options):
    monkeypatch.setattr(operator, "apply", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=re.escape(next(iter(options)))):
        op(**options)


def test_autocast_does_not_accept_integers():
    with torch.autocast("cpu", torch.bfloat16):
        loss = op(S.bfloat16(), T.half(), teacher_head=LensHead(W_T.bfloat16()))
        assert torch.isfinite(loss)
        refused(TypeError, ["student_hidden", "int64"], op, S.long())
