"""Small calls work if the cache folder of torch's compiler cannot be created."""

import pytest

from tests.support.fresh import run_fresh

PROGRAM = """
import os, tempfile, warnings
tempfile.tempdir, folder = {temp!r}, {folder!r}
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
if folder: os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
import torch
from lens_kernels import symmetric_lens_loss
torch.set_num_threads(1)
student, teacher, head = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(9, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        symmetric_lens_loss(student, teacher, head, head).backward()
print(student.grad.abs().sum() > 0, os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") == folder)
print(*(x.message for x in caught if "uncompiled" in str(x.message)), sep="\\n")
"""


@pytest.mark.parametrize("place", ["the variable", "the default"])
def test_a_file_in_the_place_of_the_cache_leaves_small_calls(tmp_path, monkeypatch, place):
    """With a file in place of the compiler's cache folder, small calls still work.

    Torch imports its compiler for every custom operator, also for calls that do not compile.
    """
    monkeypatch.setenv("LOGNAME", "some/user")
    file = tmp_path / "torchinductor_some_user"
    file.write_text("")
    folder = str(file) if place == "the variable" else ""
    done = run_fresh(PROGRAM.format(temp=str(tmp_path), folder=folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "tensor(True) True",
        f"the pointwise pass runs uncompiled, which is slower: {file} is not a folder",
    ]
