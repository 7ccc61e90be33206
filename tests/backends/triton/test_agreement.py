"""The comparison of the Triton kernels with the ``torch`` backend, run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from lens_kernels.backends.triton import agreement  # noqa: E402
from lens_kernels.options import Divergence  # noqa: E402
from tests.support.problems import recorded  # noqa: E402

CPU = torch.device("cpu")
# The hidden sizes of student and teacher, the vocabulary size, and the number of tokens.
SIZES = (24, 40, 90, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_agree_with_the_torch_backend(dtype, monkeypatch):
    evaluated = recorded(monkeypatch, agreement, "evaluate")
    # 40 tokens fill more than one block of rows.
    monkeypatch.setattr(agreement, "TOKENS", 40)
    agreement.check(*SIZES, dtype, CPU)
    calls = [call for (call,), _ in evaluated]
    assert [c.divergences[0] for c in calls] == 2 * list(Divergence)
    assert {c.student_hidden[0].shape for c in calls} == {(agreement.TOKENS, 24)}
    assert all(c.student_head.weight.dtype is dtype for c in calls)


@pytest.mark.parametrize("wrong", ["rows", 0, "weight", "bias", "norm_weight", "norm_bias"])
def test_a_wrong_result_is_named(monkeypatch, wrong):
    # The torch backend replaces the kernels here, because it is faster.
    evaluate = agreement.row_chunks.evaluate

    def faulty(call):
        result = evaluate(call)
        off = result.rows if wrong == "rows" else result.grads.get(wrong)
        if off is not None and call.divergences[0] is Divergence.TVD:
            off.view(-1)[0] += 1e-2 * off.abs().max()
        return result

    monkeypatch.setattr(agreement, "evaluate", faulty)
    head = "plain heads" if wrong in ("rows", 0, "weight") else "a head with bias, norm"
    message = f"disagree .*: tvd of {head}.*float32: the results are off by 1.0e-02"
    with pytest.raises(RuntimeError, match=message):
        agreement.check(*SIZES, torch.float32, CPU)
