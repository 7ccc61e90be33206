"""A call with several teachers: each pair has its own teacher head."""

from dataclasses import replace

import pytest
import torch

from lens_kernels import LensTranslator, distillation_loss, symmetric_lens_loss
from tests.support.compare import GRADIENT, LOSS, assert_close, assert_gradients
from tests.support.grids import BACKENDS, CLUSTER_KERNEL, ROW_KERNEL, Shape, row_stride
from tests.support.problems import capture_call, loss_of, make, oracle, ours, random_head

# A tile of the row kernel holds rows of all pairs, so of two teachers.
SHAPE = Shape((5,), 150, 8, 9, 3)
WEIGHTS = [0.5, 0.2, 0.4]


def two_teachers(shape=SHAPE, **options):
    """Return a problem whose second pair has another teacher: its width, norm and cap differ."""
    problem = make(shape, std=2.0, norm="rms", bias=True, **options)
    first = problem.teacher_head
    other = random_head(shape.vocab, 13, norm="layer", scale=0.7, softcap=3.0)
    problem.teacher_hidden[1] = torch.randn(*shape.leading, 13)
    problem.teacher_head = [first, other, first]
    return problem


def pair(problem, i):
    """Return the problem of one pair and its teacher."""
    hidden = {name: [getattr(problem, name)[i]] for name in ("student_hidden", "teacher_hidden")}
    return replace(problem, **hidden, teacher_head=problem.teacher_head[i])


def truth(problem, weights, **options):
    """Return loss and gradients in float64: a weighted sum over one call of the oracle a pair."""
    total, grads = 0.0, {}
    for i, weight in enumerate(weights):
        loss, parts = oracle(pair(problem, i), layer_weights=[weight], **options)
        total = total + loss
        for name, grad in parts.items():
            key = f"hidden{i}" if name == "hidden0" else name
            grads[key] = grads.get(key, 0.0) + grad
    return total, grads


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
@pytest.mark.parametrize("backend", [*BACKENDS, ROW_KERNEL, CLUSTER_KERNEL])
def test_the_loss_is_the_weighted_sum_over_the_teachers(backend, divergence):
    problem = two_teachers(divergence=divergence, temperature=1.7)
    options = {"mask": torch.tensor([True, False, True, True, True]), "teacher_temperature": 0.8}
    loss, grads = ours(problem, layer_weights=WEIGHTS, backend=backend, **options)
    expected, expected_grads = truth(problem, WEIGHTS, **options)
    assert_close(loss, expected, LOSS)
    assert_gradients(grads, expected_grads, GRADIENT)


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": 2 * row_stride(150) * 8}])
def test_standardised_logits_and_small_tiles(options):
    problem = two_teachers()
    loss, grads = ours(problem, layer_weights=WEIGHTS, standardize=True, **options)
    expected, expected_grads = truth(problem, WEIGHTS, standardize=True)
    assert_close(loss, expected, LOSS)
    assert_gradients(grads, expected_grads, GRADIENT)


def test_values_of_each_pair_and_token():
    problem = two_teachers()
    upstream = torch.rand(3, 5)
    loss, grads = ours(problem, reduction="none", upstream=upstream)
    parts = [
        oracle(pair(problem, i), upstream[i : i + 1], reduction="none") for i in range(len(loss))
    ]
    assert_close(loss, torch.cat([values for values, _ in parts]), LOSS)
    assert_close(grads["weight"], sum(grad["weight"] for _, grad in parts), GRADIENT)


def test_gradients_by_differences():
    problem = two_teachers(Shape((2,), 7, 4, 5, 3))
    double = [pair(problem, i).to(torch.float64) for i in range(3)]
    teachers = [each.teacher_hidden[0] for each in double]
    heads = [each.teacher_head for each in double]

    def loss(*students):
        head = double[0].student_head
        return symmetric_lens_loss([*students], teachers, head, heads, layer_weights=WEIGHTS)

    students = [each.student_hidden[0].detach().requires_grad_() for each in double]
    assert torch.autograd.gradcheck(loss, students)


def test_fullgraph():
    problem = two_teachers()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: loss_of(symmetric_lens_loss, problem), fullgraph=True, backend="eager"
    )
    assert_close(compiled(), ours(problem)[0].double(), LOSS)


def test_a_head_of_several_pairs_is_read_once(monkeypatch):
    call = capture_call(monkeypatch, two_teachers())
    assert len(call.teacher_heads) == 2
    assert call.teacher_of == (0, 1, 0)


def test_the_output_may_have_a_teacher_of_its_own():
    problem = two_teachers()
    first, other, _ = problem.teacher_head
    final = torch.randn(*SHAPE.leading, 13)

    def output(pairs, teacher_head):
        return distillation_loss(
            problem.student_hidden[:pairs], [problem.teacher_hidden[0]] * pairs,
            problem.student_head, teacher_head, student_final=problem.student_hidden[-1],
            teacher_final=final, final_divergence={"akl": 1.0, "forward_kl": 0.5},
        )  # fmt: skip

    out, alone = output(2, [first, first, other]), output(0, other)
    lens = symmetric_lens_loss(
        problem.student_hidden[:2], [problem.teacher_hidden[0]] * 2, problem.student_head, first
    )
    assert_close(out.kd, alone.kd.double(), LOSS)
    assert_close(out.lens, lens.double(), LOSS)
    expected = problem.gradients(alone.loss + lens)
    got = {name: x for name, x in problem.gradients(out.loss).items() if x is not None}
    assert_gradients(got, {name: expected[name].double() for name in got}, GRADIENT)


def test_each_teacher_has_its_own_translators():
    problem = two_teachers()
    first, other, _ = problem.teacher_head
    maps = [LensTranslator(0.1 * torch.randn(w, w), torch.randn(w)) for w in (9, 13, 9)]
    moved = replace(
        problem, teacher_hidden=[m(h) for m, h in zip(maps, problem.teacher_hidden, strict=True)]
    )
    both = replace(first, translator=[maps[0], maps[2]])
    problem.teacher_head = [both, replace(other, translator=maps[1]), both]
    assert torch.equal(ours(problem)[0], ours(moved)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda heads: heads[:2], "teacher_head has 2 heads for 3 hidden states"),
        (
            lambda heads: [*heads[:2], heads[1]],
            r"teacher_hidden\[2\] has width 9, but teacher_head",
        ),
        (lambda heads: [*heads[:2], heads[0].prefix(99)], r"teacher_head\[2\] has 99 entries"),
        (lambda heads: [*heads[:2], None], r"teacher_head\[2\] must be a LensHead"),
    ],
)
def test_wrong_heads_are_refused(change, message):
    problem = two_teachers()
    problem.teacher_head = change(problem.teacher_head)
    with pytest.raises((TypeError, ValueError), match=message):
        ours(problem)
