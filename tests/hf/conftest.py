"""What the tests of Hugging Face's side share. Without transformers there are none."""

import gc
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["*"]
else:
    from tests.support import commands, tiny


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("hf")


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Take what is loaded out of the garbage collection that every training starts with.

    With transformers loaded, one takes half a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pictures():
    """Ask for the picture of a run's loss."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Leave the picture out, which takes longer than a tiny run, unless a test asks for it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Return a folder with a student, a teacher, a model of another tokenizer, and data."""
    folder = tmp_path_factory.mktemp("files")
    for name, model, vocab in (
        ("student", tiny.model(layers=3, seed=1), 64),
        ("teacher", tiny.model(layers=4, width=24, seed=2), 64),
        ("other", tiny.model(layers=4, vocab=60), 60),
    ):
        model.save_pretrained(folder / name)
        tiny.tokenizer(vocab).save_pretrained(folder / name)
    commands.write_rows(folder / "train.jsonl", commands.ROWS)
    commands.write_rows(folder / "eval.jsonl", commands.ROWS[:2])
    return folder
