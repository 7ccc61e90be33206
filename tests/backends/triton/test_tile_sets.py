"""With two sets of tiles, passes on a second stream give the results of one stream.

A GPU may delay work on the second stream until other work waits for it. So the stream of these
tests does all work at that time. Without a wait, results differ or work is never done.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from lens_kernels import plan
from lens_kernels.backends import matmul
from lens_kernels.backends.torch import layout, row_chunks, tile_sets
from tests.support import row_kernel_backend
from tests.support.grids import FEATURES, Shape
from tests.support.objectives import make_objective, some_labels
from tests.support.problems import capture_call, recorded

SHAPE = Shape((14,), 61, 8, 8, 1)


class Later:
    """A second stream that does its work when other work waits for it."""

    def __init__(self, device):
        self.events = []

    def run(self, work):
        self.events.append(mock.Mock(wait=mock.Mock(side_effect=work)))
        return self.events[-1]


@pytest.fixture
def small(monkeypatch):
    """Make steps of 12 rows, with three tiles of 4 rows."""
    monkeypatch.setattr(layout, "BLOCK", 4)
    monkeypatch.setattr(layout, "TILE_ROWS", 4)
    monkeypatch.setattr(layout, "GRAD_ROWS", 12)
    monkeypatch.setattr(tile_sets, "SecondStream", Later)


def a_call(monkeypatch, **options):
    problem = make_objective(SHAPE, **FEATURES["everything"])
    options |= {"labels": some_labels(SHAPE), "kd_ratio": 0.5}
    return capture_call(monkeypatch, problem, whole=True, **options)


@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_results_do_not_depend_on_the_number_of_sets(monkeypatch, small, threshold):
    call = a_call(monkeypatch, grad_threshold=threshold)
    results = []
    for sets in (1, 2):
        monkeypatch.setattr(layout, "TILE_SETS", sets)
        with torch.no_grad():
            results.append(row_kernel_backend.evaluate(call))
    one, two = results
    assert torch.equal(one.rows, two.rows) and bool(one.rows.any())
    assert one.grads.keys() == two.grads.keys()
    assert all(torch.equal(grad, two.grads[key]) for key, grad in one.grads.items())


def test_the_next_tile_is_projected_before_the_pass(monkeypatch, small):
    """A step of three tiles projects both models' logits of two tiles before the first pass."""
    call, order = a_call(monkeypatch), []
    monkeypatch.setattr(layout, "TILE_SETS", 2)
    for owner, name in ((matmul, "project"), (row_chunks._RowChunks, "evaluate")):
        function = getattr(owner, name)

        def record(*args, function=function, name=name):
            order.append(name[0])
            return function(*args)

        monkeypatch.setattr(owner, name, record)
    with torch.no_grad():
        row_kernel_backend.evaluate(call)
    assert "".join(order).startswith("pp" + "pp" + "e" + "pp" + "ee")


def test_an_error_waits_for_passes(monkeypatch, small):
    """Memory that a pass uses on the second stream must not be freed before its end."""
    monkeypatch.setattr(layout, "TILE_SETS", 2)
    passes = recorded(monkeypatch, row_chunks._RowChunks, "evaluate")
    project = mock.Mock(side_effect=[None, None, RuntimeError("out of memory")])
    monkeypatch.setattr(matmul, "project", project)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        row_kernel_backend.evaluate(a_call(monkeypatch))
    assert len(passes) == 1


def test_a_pass_starts_after_the_products_of_its_tile():
    """The order of calls: wait for the current stream, do the work, then record its end."""
    order = mock.Mock()

    @contextmanager
    def on(stream):
        order.enter()
        yield
        order.leave()

    with mock.patch.multiple(torch.cuda, Stream=lambda device: order, stream=on):
        second = tile_sets.SecondStream(torch.device("cuda"))
        with mock.patch.object(torch.cuda, "current_stream", lambda device: "first"):
            event = second.run(order.work)
    names = [name for name, *_ in order.mock_calls]
    assert names == ["wait_stream", "enter", "work", "record_event", "leave"]
    assert order.wait_stream.call_args == mock.call("first")
    assert event is order.record_event.return_value


@pytest.mark.parametrize(
    ("room", "sets", "rows"), [(10**6, 1, 1), (10**9, 2, 128), (10**10, 2, 512)]
)
def test_the_workspace_bounds_two_sets(monkeypatch, room, sets, rows):
    """The room for logits is half the workspace. Without room for two tiles, there is one."""
    sizes = 8192, 128256, 2048, 4096
    monkeypatch.setattr(layout, "TILE_SETS", 2)
    made = layout.apart(*sizes[:2], torch.bfloat16, room, torch.bfloat16)
    assert (made.sets, made.tile_rows) == (sets, rows)
    held = plan(*sizes, workspace_bytes=room)["torch"].workspace_bytes
    logits, gradients = 2 * 4 * layout.row_stride(sizes[1]), 2 * made.grad_stride
    assert held == sets * rows * logits + made.grad_rows * gradients <= max(room, 2 * logits)
    assert layout.apart(*sizes[:2], torch.bfloat16, room, sharded=True).sets == 1
