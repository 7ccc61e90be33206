"""The predicted time of a step on an H100 stays within limits, and comes from the plan's counts."""

import importlib.util

import pytest

from benchmarks import kernel_report
from benchmarks.support import environment, prediction, tables
from benchmarks.support.shapes import MODELS
from lens_kernels import plan
from lens_kernels.cost import Plan, Step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the plan has no row kernel without triton"
)


def plans(key, tokens, pairs=1):
    model = MODELS[key]
    return plan(tokens, model.vocab, model.student, model.teacher, pairs=pairs)


def test_a_step_takes_its_arithmetic_or_its_traffic_and_float32_takes_longer():
    steps = Step("a", 7 * 10**11, 10**9), Step("b", 10**11, 6 * 10**9), Step("a", 7 * 10**10, 0, 4)
    planned = Plan("torch", steps, 0)
    assert prediction.step_ms(planned) == pytest.approx({"a": 1 + 1, "b": 2})
    assert prediction.total_ms(planned) == pytest.approx(4)


@pytest.mark.parametrize(("key", "bar"), [("qwen2.5", 1.75), ("llama3", 1.55)])
def test_the_prediction_meets_its_bar(key, bar):
    found = plans(key, 8192)
    ratio = prediction.of_floor(found)
    assert 1 < ratio <= bar
    # The row pass reads the logits of both models three times, and writes a 16-bit gradient.
    moved = 8192 * MODELS[key].vocab * (3 * 2 * 4 + 2)
    pass_ms = prediction.part_ms(found["torch"])["pass"]
    assert pass_ms == pytest.approx(moved / prediction.BYTES_PER_MS, rel=1e-3)


@pytest.mark.parametrize("key", ["qwen2.5", "llama3"])
def test_five_pairs_cost_what_as_many_rows_of_one_pair_cost(key):
    one, five = (prediction.total_ms(plans(key, *size)["torch"]) for size in ((5120, 1), (1024, 5)))
    assert five == pytest.approx(one, rel=0.1)


def test_the_page_has_the_predictions():
    assert f"\n{prediction.table()}\n" in kernel_report.PAGE.read_text()


def test_the_readme_has_what_was_counted_and_predicted():
    text = (environment.ROOT / "README.md").read_text()
    ratios = [prediction.of_floor(plans(key, 8192)) for key in prediction.SHAPES]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times the four GEMMs" in text
    rows = tables.read_csv(environment.DATA / "offline" / "row_pass_bfloat16.csv")
    kernel = {"arch": "sm_90", "divergence": "jsd_half", "variant": "plain"}
    (row,) = (row for row in rows if kernel.items() <= row.items())
    counted = f"{float(row['bytes_a_pair']):.0f} bytes and {float(row['instructions_a_pair']):.0f}"
    assert f"{counted} instructions a pair of" in text
    # The README says this only while the data folder has no GPU results.
    assert "Nothing has run or been timed on a GPU yet" in text
    assert not [*environment.DATA.glob("gpu*")]
