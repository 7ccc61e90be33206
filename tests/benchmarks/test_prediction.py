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


def plans(key, tokens, pairs=1, one_read=False):
    model = MODELS[key]
    sizes = model.vocab, model.student, model.teacher
    return plan(tokens, *sizes, pairs=pairs, one_read=one_read)


def test_a_step_takes_its_arithmetic_or_its_traffic_and_float32_takes_longer():
    steps = Step("a", 7 * 10**11, 10**9), Step("b", 10**11, 6 * 10**9), Step("a", 7 * 10**10, 0, 4)
    planned = Plan("torch", steps, 0)
    assert prediction.step_ms(planned) == pytest.approx({"a": 1 + 1, "b": 2})
    assert prediction.total_ms(planned) == pytest.approx(4)


@pytest.mark.parametrize(
    ("key", "reads", "bar"),
    [("qwen2.5", 3, 1.75), ("llama3", 3, 1.55), ("qwen2.5", 1, 1.5), ("llama3", 1, 1.4)],
)
def test_the_prediction_meets_its_bar(key, reads, bar):
    found = plans(key, 8192, one_read=reads == 1)
    ratio = prediction.of_floor(found)
    assert 1 < ratio <= bar
    # The row pass reads the logits of both models, and writes a 16-bit gradient.
    moved = 8192 * MODELS[key].vocab * (reads * 2 * 4 + 2)
    pass_ms = prediction.part_ms(found["torch"])["pass"]
    assert pass_ms == pytest.approx(moved / prediction.BYTES_PER_MS, rel=1e-3)


@pytest.mark.parametrize("one_read", [False, True])
@pytest.mark.parametrize("key", ["qwen2.5", "llama3"])
def test_five_pairs_cost_what_as_many_rows_of_one_pair_cost(key, one_read):
    sizes = (5120, 1), (1024, 5)
    one, five = (prediction.total_ms(plans(key, *size, one_read)["torch"]) for size in sizes)
    assert five == pytest.approx(one, rel=0.1)


def test_the_page_has_the_predictions():
    page = kernel_report.PAGE.read_text()
    assert f"\n{prediction.table()}\n" in page and f"\n{prediction.buffers_table()}\n" in page


def test_the_default_buffers_move_the_least_and_larger_buffers_save_no_time():
    found = {rows: prediction.with_buffers(*rows) for rows in prediction.BUFFERS}
    (planned, held), *others = found.values()
    assert planned == plans("llama3", 8192)["torch"]
    for other, size in others:
        assert prediction.total_ms(other) >= prediction.total_ms(planned)
        assert other.bytes_moved > planned.bytes_moved or size > 1.3 * 2**30 > held


def test_the_page_says_what_a_cluster_would_take_without_overlap():
    found = []
    for key in prediction.SHAPES:
        planned = plans(key, 8192, one_read=True)
        total = prediction.total_ms(planned["torch"])
        longer = total + prediction.issue_ms(MODELS[key], 8192, True)
        found.append(f"{prediction.of_floor(planned) * longer / total:.2f}")
    assert "{} for Qwen2.5 and {} for Llama-3".format(*found) in kernel_report.PAGE.read_text()


def test_the_readme_has_what_was_counted_and_predicted():
    text = (environment.ROOT / "README.md").read_text()
    rows = tables.read_csv(environment.DATA / "offline" / "row_pass_bfloat16.csv")
    kernel = {"arch": "sm_90", "divergence": "jsd_half", "variant": "plain"}
    found = (row for row in rows if kernel.items() <= row.items())
    for row in found:
        held = row["cluster"] != "1"
        ratios = [prediction.of_floor(plans(key, 8192, one_read=held)) for key in prediction.SHAPES]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times {'with' if held else 'the'}" in text
        size, instructions = float(row["bytes_a_pair"]), prediction.instructions(held)
        counted = f"{size:.0f} bytes and {instructions:.0f} instructions"
        assert counted + ("." if held else " a pair of") in text
    # The README says that nothing was timed on a GPU only while the data folder has no GPU results.
    assert "Nothing has run or been timed on a GPU yet" in text
    assert not [*environment.DATA.glob("gpu*")]
