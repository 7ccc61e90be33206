"""Fixed values of the objective: if a test here fails, the objective itself has changed.

Teacher p = (4, 2, 1, 1)/8, student q = (1, 1, 2, 4)/8. Heads are the identity, so that hidden
states are logits. Comments give formulas of values and gradients, in which ln is the natural
logarithm.
"""

import inspect
import math

import pytest
import torch

from lens_kernels import LensHead, LensNorm, distillation_loss, symmetric_lens_loss
from tests.support.grids import PRECISIONS

P, Q = (4 / 8, 2 / 8, 1 / 8, 1 / 8), (1 / 8, 1 / 8, 2 / 8, 4 / 8)

# For each divergence: its options, its value, and its gradient with respect to the student's
# logits.
PINNED = {
    "forward_kl": (  # Forward KL. Value: the sum of p ln(p/q) is 7/8 ln 2. Gradient: q - p.
        {},
        0.6065037829899521,
        (-0.375, -0.125, 0.125, 0.375),
    ),
    # Reverse KL. Value: the sum of q ln(q/p) is 7/8 ln 2. Gradient: q (ln(q/p) - 7/8 ln 2).
    "reverse_kl": (
        {},
        0.6065037829899521,
        (-0.2490997680, -0.1624563704, 0.0216608494, 0.3898952891),
    ),
    "jeffreys": (  # Jeffreys: the sum of forward KL and reverse KL, without a factor 1/2.
        {},
        1.2130075659799042,
        (-0.6240997680, -0.2874563704, 0.1466608494, 0.7648952891),
    ),
    "tvd": (  # Total variation. Value: half the sum of |p - q|. Gradient: q (sign(q - p)/2 - 1/4).
        {},
        0.5,
        (-0.09375, -0.09375, 0.0625, 0.125),
    ),
    "hellinger": (  # Hellinger. Value: 1 minus the sum of sqrt(p q), which is 1/2 + sqrt(2)/4.
        {},
        0.1464466094067262,
        (-0.0716529131, -0.0350412607, 0.0183058262, 0.0883883476),
    ),
    # The mixture m = (p + q)/2 is (5, 3, 3, 5)/16. The value is (KL(p, m) + KL(q, m))/2.
    "jsd": (
        {},
        0.1417028527380231,
        (-0.0661245990, -0.0341979976, 0.0182474025, 0.0820751942),
    ),
    # The mixture p/4 + 3q/4 is (7, 5, 7, 13)/32.
    "jsd of beta 1/4": (
        {"beta": 0.25},
        0.1079072963215452,
        (-0.0561537564, -0.0246094842, 0.0176575837, 0.0631056569),
    ),
    # The mixture 9p/10 + q/10 is (37, 19, 11, 13)/80.
    "jsd of beta 9/10": (
        {"beta": 0.9},
        0.0531504059467182,
        (-0.0221997972, -0.0138688106, 0.0032546510, 0.0328139568),
    ),
}


def logits(probabilities, dtype=torch.float64):
    return torch.tensor([probabilities], dtype=dtype).log()


@pytest.mark.parametrize(("backend", "dtype"), PRECISIONS)
@pytest.mark.parametrize("name", PINNED)
def test_divergence_and_gradient(backend, name, dtype):
    options, value, gradient = PINNED[name]
    student = logits(Q, dtype).requires_grad_()
    eye = torch.eye(4, dtype=dtype)
    loss = symmetric_lens_loss(
        student,
        logits(P, dtype),
        eye,
        eye,
        divergence=name.split()[0],
        backend=backend,
        **options,
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6 if dtype is torch.float32 else 1e-14)
    assert student.grad[0].tolist() == pytest.approx(
        gradient, abs=1e-7 if dtype is torch.float32 else 1e-10
    )


SHARED = {
    "divergence": "jsd",
    "beta": 0.5,
    "temperature": 1.0,
    "teacher_temperature": None,
    "temperature_squared": False,
    "standardize": False,
    "token_clip": None,
    "layer_weights": None,
    "mask": None,
    "denominator": None,
    "vocab_size": None,
    "backend": "auto",
    "workspace_bytes": None,
    "grad_threshold": None,
    "teacher_statistics": None,
    "process_group": None,
}
OBJECTIVE = {"kd_ratio": 1.0, "lens_coeff": 1.0, "final_divergence": "reverse_kl", "labels": None}


@pytest.mark.parametrize(
    ("function", "own"),
    [(symmetric_lens_loss, {"reduction": "mean"}), (distillation_loss, OBJECTIVE)],
)
def test_defaults(function, own):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == SHARED | own


# Relative tolerances of a loss, for a few rounding errors in each dtype.
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(params=PRECISIONS, ids=lambda x: f"{x[0]}-{str(x[1]).split('.')[1]}")
def forward_kl(request):
    """Return a function that computes the loss with the forward KL, which is simple by hand."""
    backend, dtype = request.param

    def loss(student, teacher, student_head=None, teacher_head=None, **options):
        eye = LensHead(torch.eye(4))
        heads = [(h or eye).map(lambda x: x.to(dtype)) for h in (student_head, teacher_head)]
        hidden = [
            [h.to(dtype) for h in (side if isinstance(side, list) else [side])]
            for side in (student, teacher)
        ]
        options = {"divergence": "forward_kl", "backend": backend, **options}
        return symmetric_lens_loss(*hidden, *heads, **options)

    return loss


def agrees(loss, value):
    """Return whether a loss equals the value, within the tolerance for the loss's dtype."""
    return loss.item() == pytest.approx(value, rel=RELATIVE[loss.dtype])


L = math.log(2)


def test_temperature_divides_the_logits_and_multiplies_nothing(forward_kl):
    """At temperature 1/2 the probabilities are squared: (16, 4, 1, 1)/22 and (1, 1, 4, 16)/22."""
    value = (16 * 4 * L + 4 * 2 * L - 2 * L - 4 * L) / 22
    assert value == pytest.approx(2.0794415416798357, rel=1e-12)
    assert agrees(forward_kl(logits(Q), logits(P), temperature=0.5), value)


def test_scale_then_softcap_then_temperature(forward_kl):
    """The student's two logits are softcap tanh(scale (h + b) / softcap) / T and 0.

    h is a hidden state, b the bias, and T the temperature.
    """
    h = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0], dtype=torch.float64)
    student = LensHead(weight, bias, scale=2.0, softcap=4.0)
    teacher = LensHead(0 * weight)
    z = 4 * math.tanh(2 * 1.5 / 4) / 3
    value = -L + math.log1p(math.exp(z)) - z / 2
    assert value == pytest.approx(0.0870901951, rel=1e-6)
    assert agrees(forward_kl(h, h, student, teacher, temperature=3.0), value)


@pytest.mark.parametrize(
    ("norm", "first", "second"),
    [
        # The hidden state (3, 1) has mean square 5, mean 2 and variance 1.
        (LensNorm("rms", None, eps=0.0), 3 / math.sqrt(5), 1 / math.sqrt(5)),
        (LensNorm("rms", None, eps=4.0), 1.0, 1 / 3),
        (LensNorm("layer", None, eps=0.0), 1.0, -1.0),
        (LensNorm("layer", None, eps=3.0), 0.5, -0.5),
        (LensNorm("rms", torch.tensor([1.0, 2.0]).double(), eps=4.0, offset=1.0), 2.0, 1.0),
        (
            LensNorm("rms", torch.ones(2).double(), torch.tensor([0.0, 1.0]).double(), eps=4.0),
            1.0,
            4 / 3,
        ),
    ],
    ids=["rms", "rms_eps", "layer", "layer_eps", "offset", "bias"],
)
def test_norms(forward_kl, norm, first, second):
    h = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    z = first - second
    # The teacher gives both entries the probability 1/2.
    value = -L + math.log1p(math.exp(z)) - z / 2
    assert agrees(forward_kl(h, h, LensHead(eye, norm=norm), LensHead(0 * eye)), value)


def test_reductions_and_weights(forward_kl):
    """One lens pair has a loss of 7/8 ln 2 for each token, and the other pair 0.

    One of three tokens is masked.
    """
    student, teacher = logits(Q).expand(3, 4), logits(P).expand(3, 4)
    pairs = ([student, teacher], [teacher, teacher])
    mask = torch.tensor([1, 0, 1])
    each = 7 / 8 * L
    for options, value in (
        ({}, each / 2),
        ({"reduction": "sum"}, 2 * each / 2),
        ({"denominator": 5}, 2 * each / 2 / 5),
        ({"layer_weights": [3.0, 1.0]}, 3 * each),
    ):
        assert agrees(forward_kl(*pairs, mask=mask, **options), value)


@pytest.mark.parametrize(("backend", "dtype"), PRECISIONS)
def test_the_whole_objective(backend, dtype):
    """The terms are one lens pair of jsd, a final reverse KL of 7/8 ln 2, and a cross entropy of ln
    8."""
    eye = torch.eye(4, dtype=dtype)
    out = distillation_loss(
        [logits(Q, dtype)],
        [logits(P, dtype)],
        eye,
        eye,
        student_final=logits(Q, dtype),
        teacher_final=logits(P, dtype),
        labels=torch.tensor([1]),
        kd_ratio=0.75,
        lens_coeff=2.0,
        backend=backend,
    )
    jsd = PINNED["jsd"][1]
    assert out.loss.dtype is dtype
    assert agrees(out.ce, 3 * L)
    assert agrees(out.kd, 7 / 8 * L)
    assert agrees(out.lens, jsd)
    value = 0.25 * 3 * L + 0.75 * (7 / 8 * L + 2 * jsd)
    assert value == pytest.approx(1.1872925018, rel=1e-9)
    assert agrees(out.loss, value)
