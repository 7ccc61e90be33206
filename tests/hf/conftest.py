"""Fixtures for the tests of ``lens_kernels.hf``, which run only if transformers is installed."""

import gc
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["*"]
else:
    from huggingface_hub import constants

    from tests.support import commands, tiny


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("hf")


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Exclude loaded objects from garbage collection, which runs when a training starts.

    With transformers loaded, one collection takes half a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_precision():
    """Undo the mixed precision of a test's trainer.

    transformers 4 stores it in the environment, so all later runs of the process would use it.
    """
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture
def accelerator_state():
    """Reset accelerate's state, which is global in the process, before and after this test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures():
    """Let this test draw the loss picture of a run."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Skip the drawing of loss pictures, unless a test uses ``pictures``.

    Drawing takes longer than a tiny run.
    """
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("lens_kernels.hf.training.report.loss_figure", lambda *_: None)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Return a folder with data and three tiny models with tokenizers.

    The models are student, teacher, and other, which has a smaller vocabulary.
    """
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that puts a copy of a folder into the Hub's cache, under a given name."""
    cache = str(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # Before version 5, transformers keeps a copy of the folder of the Hub's cache.
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", cache, raising=False)

    def put(folder, name):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return name

    return put


@pytest.fixture
def connections(hub, monkeypatch):
    """Refuse every network connection, and return a list of the requested hosts."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("this test has no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda _, host: refuse(host))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # From version 1 on, huggingface_hub requests a registry of agents once in each process.
    registry = sys.modules.get("huggingface_hub.utils._detect_agent")
    if registry is not None:
        monkeypatch.setattr(registry, "_registry", None)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", "none")
    # Before version 5, transformers keeps a copy of the setting HF_HUB_OFFLINE.
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False, raising=False)
    return asked
