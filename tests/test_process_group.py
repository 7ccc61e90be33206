"""A vocabulary that is sharded over 2 to 4 processes gives the results of a single process."""

import random
import re
from types import SimpleNamespace

import pytest
import torch

from lens_kernels import adaptive, sharding
from lens_kernels.backends.torch.layout import row_stride
from tests.support import sharded
from tests.support.compare import assert_close, relative_error
from tests.support.grids import DIVERGENCES, FEATURES, Shape
from tests.support.processes import Ranks
from tests.support.sharded import SHAPE, WIDTH, problem_of, solve

# Each rank has only its own rows of the head's weight and bias, and of their gradients.
HEAD = ("weight", "bias")
# With this small workspace, a lens pair takes several chunks.
SMALL = {"workspace_bytes": 18 * row_stride(16) * 2 * 8}
FEATURE = {**FEATURES["everything"], **SMALL, "masked": True}
OBJECTIVE = {**FEATURE, "whole": True, "labelled": True, "kd_ratio": 0.5}
CASES = {
    **{d: {"divergence": d, **FEATURE} for d in DIVERGENCES},
    "objective": OBJECTIVE | {"masked": False},
    "labels only": {"whole": True, "labelled": True, "kd_ratio": 0.0, **SMALL},
    "akl": {"whole": True, "final_divergence": "akl", **SMALL, "bias": True},
    "prefix": OBJECTIVE | {"vocab_size": WIDTH - 3},
    "none": {"reduction": "none", **SMALL, "norm": "rms"},
    "weights": {"layer_weights": [0.3, 2.0], "denominator": 11.0, "beta": 0.2},
    "frozen head": {"frozen_head": True, **FEATURE},
    "statistics": {"statistics": True, "temperature": 1.0},
    "teachers": {"teachers": True, "norm": "rms", **SMALL},
    "clip": {"token_clip": 0.3, **FEATURE},
    "standardized": {"standardize": True, **FEATURE},
    "standardized, labels": OBJECTIVE | {"standardize": True, "teacher_temperature": 0.7},
    "standardized lens": OBJECTIVE | {"standardize": "lens", "divergence": "reverse_kl"},
    "sparse": {"rest": None, "vocab_size": WIDTH - 3, **SMALL},
    "ghost": {"rest": "ghost", **FEATURE},
    "uniform": {"rest": "uniform", **FEATURE},
    "sparse output": OBJECTIVE | {"rest": "uniform", "standardize": True},
    "sparse, standardized": {"rest": "ghost", "standardize": True, "token_clip": 1.0, **FEATURE},
    "no tokens": {"shape": Shape((0,), WIDTH, 12, 10, 1)},
}


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(4)
    yield group
    group.close()


def joined(results, name, vocab):
    """Return the result called ``name``, joined from the results of all ranks.

    Gradients of the head have rows of all ranks, in rank order. Other results must be equal on all
    ranks.
    """
    parts = [result[name] for result in results]
    if name in HEAD:
        return torch.cat(parts)
    for part in parts[1:]:
        assert torch.equal(part, parts[0]), f"{name} differs between ranks"
    return parts[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_the_loss_and_gradients_of_one_process(ranks, size):
    some = "objective", "akl", "prefix", "none", "sparse output", "ghost"
    for name in CASES if size == 3 else some:
        case = CASES[name]
        truth = solve(*problem_of(case))
        results = ranks.run(sharded.solve_sharded, size, case)[:size]
        for key, expected in truth.items():
            assert_close(joined(results, key, WIDTH), expected, 1e-6, f"{name}: {key}")
        if name not in ("no tokens", "labels only"):
            assert truth["loss"].abs().max() > 0.01, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_as_accurate_as_in_one_process(ranks, dtype):
    # The logits of the last case are so large that exponentials need the maximum over all ranks.
    far = {"scale": 60.0, "divergence": "tvd"}
    standard = {"standardize": True, "bias": True, "norm": "rms"}
    plain = {"divergence": "hellinger", "bias": True}
    for case in (OBJECTIVE | {"masked": False}, plain, far, standard):
        wide, _ = problem_of(case)
        problem, options = problem_of(case | {"dtype": dtype})
        truth = solve(problem.to(torch.float64), options)
        alone = solve(problem, options)
        results = ranks.run(sharded.solve_sharded, 3, case | {"dtype": dtype})[:3]
        for key, expected in truth.items():
            error = relative_error(joined(results, key, WIDTH), expected)
            assert error <= 2 * relative_error(alone[key], expected) + 1e-6, key


# Each of the interpreted kernels takes milliseconds for each row.
KERNEL = {"dtype": torch.float32, "backend": "row_kernel"}
KERNEL_CASES = {
    "objective": OBJECTIVE | {"shape": Shape((5,), WIDTH, 12, 10, 2)},
    "two teachers": {"teachers": True, "shape": Shape((2,), WIDTH, 12, 10, 2)},
    "far": {"scale": 60.0, "divergence": "forward_kl", "shape": Shape((3,), WIDTH, 12, 10, 1)},
    # With its own layout, the first of two ranks would have two chunks, and the second rank one.
    "unlike": {"shape": Shape((3,), 97, 12, 10, 1), "workspace_bytes": 2250},
    # Inputs that are bfloat16 numbers have exact products in float32.
    "unlike, exact": {
        "shape": Shape((3,), 97, 12, 10, 1),
        "workspace_bytes": 2250,
        "exact_products": True,
    },
}
# With a group, calls with these options do not use the row kernel.
OTHERS = {"standardize", "rest", "token_clip"}
SLOW_CASES = [*KERNEL_CASES, *(name for name, case in CASES.items() if not OTHERS & case.keys())]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, KERNEL_CASES),
        *(pytest.param(size, SLOW_CASES, marks=pytest.mark.slow) for size in (3, 4)),
    ],
)
def test_the_row_kernel_computes_the_loss_and_gradients_of_one_process(ranks, size, names):
    for name in names:
        case = {**CASES, **KERNEL_CASES}[name]
        problem, options = problem_of(case | KERNEL)
        truth = solve(problem.to(torch.float64), options | {"backend": "torch"})
        results = ranks.run(sharded.solve_sharded, size, case | KERNEL)[:size]
        for key, expected in truth.items():
            # Here one entry errs by 1.04e-6, by rounding. With exact products it does not.
            bound = 1.1e-6 if (size, name) == (3, "unlike") else 1e-6
            assert_close(joined(results, key, WIDTH), expected, bound, f"{name}: {key}")


def test_a_chunk_takes_three_reductions_and_a_hidden_state_one(ranks):
    case = {**FEATURES["everything"], "dtype": torch.float32, **SMALL}
    row = 2 * 4 * row_stride(-(-WIDTH // 3))
    chunks, tokens = -(-SHAPE.tokens // (SMALL["workspace_bytes"] // row)), SHAPE.tokens
    (seen, *others) = ranks.run(sharded.count_collectives, 3, case)[:3]
    assert seen == others[0] == others[1]
    (first, *rest) = seen
    # Each of 3 ranks sends six int64 numbers: the rows of its two heads, and four numbers on which
    # all ranks must agree.
    assert first == ("all_gather", 3 * 8 * 6)
    assert {name for name, _ in rest} == {"all_reduce"}
    # Two more reductions add the gradients of the norm's weight and bias.
    assert len(rest) == SHAPE.pairs * (3 * chunks + 1) + 2
    width = SHAPE.student
    # For each row, six numbers are reduced: two maxima, two sums of exponentials, and the sums of f
    # and of h.
    sums = SHAPE.pairs * tokens * (3 * 2 + width) + 2 * width
    assert sum(size for _, size in rest) == 4 * sums
    frozen = ranks.run(sharded.count_collectives, 3, case | {"frozen_head": True})[0]
    assert len(frozen) == 1 + SHAPE.pairs * 3 * chunks + 1, "only hidden0 needs a gradient"


def test_labels_and_the_adaptive_kl_take_more_reductions(ranks):
    def sizes(**case):
        seen = ranks.run(sharded.count_collectives, 3, {"whole": True, "kd_ratio": 1.0, **case})[0]
        return [size for kind, size in seen if kind == "all_reduce"]

    found = sizes(dtype=torch.float32, labelled=True, kd_ratio=0.5)
    one = found[0] // 2  # the bytes of one number for each counted token
    hidden = 4 * SHAPE.student * SHAPE.tokens
    assert 0 < one < 4 * SHAPE.tokens
    # The final states, which have labels, come last.
    assert found == 2 * [2 * one, 2 * one, 2 * one, hidden] + [3 * one, 3 * one, 3 * one, hidden]
    for dtype, weights in ((torch.float32, 12), (torch.float64, 20)):
        # The adaptive KL is two pairs. A pair takes four reductions.
        akl = len(sizes(dtype=dtype, final_divergence="akl"))
        assert akl == len(sizes(dtype=dtype)) + 4 + weights


def test_standardised_logits_take_one_gather_more(ranks):
    case = {"standardize": True, "dtype": torch.float32, "shape": Shape((3,), WIDTH, 12, 10, 1)}
    (first, moments, *rest) = ranks.run(sharded.count_collectives, 3, case)[0]
    # Each of 3 ranks sends five numbers for each row of both models.
    assert (first[0], moments) == ("all_gather", ("all_gather", 3 * 4 * 5 * 3 * 2))
    sizes = [size for name, size in rest if name == "all_reduce"]
    # The last of a chunk's three reductions also has two sums for the gradient.
    assert sizes[:3] == [4 * 3 * number for number in (2, 2, 4)]
    plain = ranks.run(sharded.count_collectives, 3, case | {"standardize": False})[0]
    assert len(plain) == len(rest) + 1


def test_no_rank_holds_more_logits_than_its_share(ranks):
    for result in ranks.run(sharded.largest_tensor, 4):
        assert result == 7 * row_stride(-(-2001 // 4))


def test_the_active_vocabulary_stays_within_its_bound(ranks):
    case = {"whole": True, "shape": Shape((9,), 499, 12, 10, 1), "scale": 4.0}
    exact = solve(*problem_of(case))
    for threshold in (1e-4, "bf16", 0.0):
        results = ranks.run(sharded.solve_active, 3, case | {"grad_threshold": threshold})[:3]
        dropped = joined(results, "dropped", 499)
        assert 0 < dropped < 0.3 if threshold else dropped == 0
        limit = 0.1 if threshold == 1e-4 else 2.0**-8 if threshold else 1e-12
        for key, expected in exact.items():
            if key not in ("dropped", "clipped"):
                actual = joined(results, key, 499)
                error = (actual - expected).norm() / expected.norm()
                assert error < limit, (threshold, key, error)
                changes = bool(threshold) and key not in ("loss", "kd", "lens", "per_layer")
                assert (error > 1e-9) == (changes and key != "num_tokens"), (threshold, key)


def test_dtensor_heads_keep_their_shards(ranks):
    case = OBJECTIVE | {"masked": False}
    truth = solve(*problem_of(case))
    for result in ranks.run(sharded.solve_dtensors, case):
        for key in ("loss", "weight", "bias", "hidden0", "norm_weight"):
            assert_close(result[key], truth[key], 1e-6, key)


def test_tokens_of_one_sequence_may_be_on_several_ranks(ranks):
    truth = solve(*problem_of(sharded.SEQUENCE))
    results = ranks.run(sharded.tokens_of_one_sequence)
    for result in results:
        for name in ("loss", "weight", "bias", "norm_weight"):
            assert_close(result[name], truth[name], 1e-9, name)
    hidden = torch.cat([result["hidden0"] for result in results], 1)
    assert_close(hidden, truth["hidden0"], 1e-9)
    assert results[-1]["hidden0"].shape[1] == 0 and results[-1]["num_tokens"] == 0


def test_equal_probabilities_join_the_head_in_their_order(ranks):
    for p in sharded.TIED:
        whole = adaptive.share_of((torch.tensor([p]), sharded.OTHER[None]), None)
        for share in ranks.run(sharded.head_share_of, 3, p)[:3]:
            assert_close(share, whole, 1e-6)


REFUSALS = {
    "tokens": "same number of tokens.*\\[35, 35, 30\\]",
    "mask": "same number of unmasked tokens",
    "options": "same options \\(as a checksum\\)",
    "rest": "same options \\(as a checksum\\)",
    "grads": "same tensors that require a gradient",
    "cuts": "cut at the same entries of the shared vocabulary.*teacher_head",
    "empty": "rank 1 of process_group holds none of the 20 entries.*fewer ranks",
    "sizes": "student_head has 61 entries, teacher_head has 64.*vocab_size=61",
    "triton": "does not support these tensors on cpu: it has no reductions over a process_group",
    "placement": "student_head.weight is a DTensor with placements .*Replicate",
    "no group": "process_group must be a torch.distributed.ProcessGroup, got str",
}


def test_calls_that_do_not_match_are_refused_on_every_rank(ranks):
    for name, message in REFUSALS.items():
        for error in ranks.run(sharded.refused, name)[:3]:
            assert re.search(message, error), f"{name}: {error}"


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_with_a_message(victim):
    group = Ranks(3)
    try:
        outcomes = group.outcomes(sharded.die_within, 3, victim, 3)
        for rank, (message, failure) in enumerate(outcomes):
            if rank != victim:
                assert failure is None
                assert re.search(
                    f"failed on rank {rank} of 3: .*rank .{victim}. reported no error", message
                ), message
    finally:
        group.close()


def test_a_rank_that_reports_at_the_last_moment_is_not_named(monkeypatch):
    reported = set()
    store = SimpleNamespace(
        set=lambda name, value: reported.add(name), check=lambda names: reported >= {*names}
    )

    class Clock:
        now, sleep = 0.0, staticmethod(lambda seconds: None)

        def monotonic(self):
            if self.now:
                reported.add("lens_kernels/failed/a group/1")
            self.now += 2 * sharding.WAIT
            return self.now

    monkeypatch.setattr(sharding, "time", Clock())
    monkeypatch.setattr(sharding.compat, "default_store", lambda: store)
    monkeypatch.setattr(sharding.dist, "get_process_group_ranks", lambda group: [0, 1, 2])
    monkeypatch.setattr(sharding.dist, "get_rank", lambda: 0)
    said = sharding._silent(SimpleNamespace(group_name="a group"))
    assert said.startswith("Of all processes, rank [2] reported no error")


@pytest.mark.slow
def test_no_random_kill_hangs():
    chance = random.Random(0)
    for _ in range(50):
        victim = chance.randrange(3)
        group = Ranks(3)
        outcomes = group.outcomes(sharded.die_within, 3, victim, chance.randrange(1, 8))
        group.close()
        for rank, (message, failure) in enumerate(outcomes):
            if rank != victim:
                assert failure is None and f"failed on rank {rank} of 3" in message
