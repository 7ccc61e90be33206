"""Sharded models give the gradients of one process, and send as many bytes as ``plan`` says."""

import pytest
import torch

from lens_kernels import plan
from tests.support import sharded_models
from tests.support.processes import KINDS, Ranks

VOCAB, WIDTHS = 64, (16, 24)


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


def sent(seen, kind):
    return sum(size for name, size in seen if name == kind)


def planned(parameters, world, kind):
    """Return the bytes that ``plan`` predicts for each kind of collective operation."""
    found = plan(
        sharded_models.tokens(), VOCAB, *WIDTHS, pairs=3, dtype=torch.float32, device="cpu",
        world=world, student_parameters=parameters[0], teacher_parameters=parameters[1],
    )[kind]  # fmt: skip
    total = {}
    for x in found.collectives:
        total[x.kind] = total.get(x.kind, 0) + x.tensor_bytes
    return total


# In torch 2.8, FSDP2 on CPUs adds the gradients of all ranks and does not divide by their number.
divides = pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="FSDP2 of torch 2.8 does not average on CPUs"
)
CASES = {
    "untied": {},
    "tied": {"tied": True},
    "resharded": {"whole_root": False},
    "mixed": {"mixed": True},
    "ddp": {"kind": "ddp"},
    "vocabulary": {"kind": "vocabulary"},
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[divides] if name != "ddp" else [])
        for name, case in CASES.items()
    ],
)
def test_a_sharded_step_equals_that_of_one_process(ranks, case):
    for result in ranks.run(sharded_models.run, case):
        errors = result["errors"]
        if "mixed" in case:
            # The gradients of the random blocks amplify the rounding of bfloat16.
            assert 0 < result["loss"] < 0.01 and 0 < errors["lm_head.weight"] < 0.1
        else:
            assert result["loss"] < 1e-6 and max(errors.values()) < 1e-5


def check_collectives(result, world, kind):
    """Check that a step's collective operations send the number of bytes that ``plan`` predicts."""
    expected = {name: 0 for name in KINDS} | planned(result["parameters"], world, kind)
    norm = 4 * WIDTHS[0]
    if kind != "ddp":
        # FSDP's root module contains embeddings and norm. It is gathered only once in a step, but
        # the plan counts two gathers.
        expected["all_gather"] -= 4 * VOCAB * WIDTHS[0] + norm
    if kind == "vocabulary":
        # The plan leaves out the gather of sizes and options, and the gradient of the norm.
        expected["all_gather"] += world * 6 * 8
        expected["all_reduce"] += norm
    assert {name: sent(result["seen"], name) for name in KINDS} == expected


@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "vocabulary"])
def test_a_step_sends_what_the_plan_counts(ranks, kind):
    for result in ranks.run(sharded_models.run, {"kind": kind}):
        check_collectives(result, 2, kind)


@pytest.mark.slow
def test_four_ranks_send_what_the_plan_counts():
    group = Ranks(4)
    for kind in ("fsdp2", "ddp", "vocabulary"):
        for result in group.run(sharded_models.run, {"kind": kind}):
            check_collectives(result, 4, kind)
    group.close()
