"""A run that is killed while it writes files can be resumed, and then ends normally."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lens_kernels import cli
from tests.support.commands import arguments

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class Writes:
    """Counts the changes of files in a folder, and kills the process at one of them.

    Every second kill also truncates the last file. The process dies at a count and not at a time,
    because a count is the same on every machine.
    """

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.kill_at, self.seen = str(folder), kill_at, 0
        # torch.save and serialize_file write files without Python's ``open``, so they are counted
        # separately.
        for module, name in ((torch, "save"), (safetensors.torch, "serialize_file")):
            setattr(module, name, self.watched(getattr(module, name)))
        sys.addaudithook(self.audit)

    def audit(self, event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
        if (writes or event in CHANGES) and str(args[0]).startswith(self.folder):
            self.count(None)

    def watched(self, save):
        def saved(tensors, path, *args, **options):
            save(tensors, path, *args, **options)
            if isinstance(path, (str, Path)):
                self.count(path)

        return saved

    def count(self, path):
        self.seen += 1
        if self.seen == self.kill_at:
            if path is not None and self.kill_at % 2:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def run(argv, folder, kill_at, counted):
    """Run the command in a forked process, and return its exit status, which is -9 after a kill."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            writes = Writes(folder, kill_at)
            status = cli.main(argv)
            counted.write_text(str(writes.seen))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_killed_and_resumed(files, tmp_path):
    options = {
        "max_steps": 6,
        "save_steps": 1,
        "save_total_limit": 2,
        "lr_scheduler_type": "linear",
    }
    argv = arguments(files, tmp_path / "whole", **options)
    counted = tmp_path / "count"
    assert run(argv, tmp_path / "whole", 0, counted) == 0
    total = int(counted.read_text())
    assert total > 100
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    chosen = random.Random(0)
    for kill in range(10):
        output = tmp_path / f"killed-{kill}"
        argv = arguments(files, output, **options)
        kill_at = chosen.randrange(total * kill // 10, total * (kill + 1) // 10) + 1
        statuses = [run(argv, output, kill_at, counted)]
        while statuses[-1] != 0 and len(statuses) < 5:
            statuses.append(run(argv, output, kill_at if len(statuses) == 1 else 0, counted))
        assert statuses[0] == -signal.SIGKILL and statuses[-1] == 0, (kill_at, statuses)
        assert set(statuses) == {0, -signal.SIGKILL}, (kill_at, statuses)
        assert (output / "model.safetensors").read_bytes() == expected, kill_at
        shutil.rmtree(output)
