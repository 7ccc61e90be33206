"""Importing the package loads only torch, and the op needs no other package."""

import pytest

from tests.support.fresh import run_fresh

USE = """
import torch
from lens_kernels import symmetric_lens_loss
student = torch.randn(3, 4, requires_grad=True)
symmetric_lens_loss(student, torch.randn(3, 5), torch.randn(7, 4), torch.randn(7, 5)).backward()
assert student.grad.abs().sum() > 0
"""


HEAVY = ["transformers", "accelerate", "datasets", "matplotlib", "reference"]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("from lens_kernels import symmetric_lens_loss", ["triton", *HEAVY]),
        ("from lens_kernels import *", ["triton", *HEAVY]),
        # torch may import triton when it calls a custom operator, so only the import itself is
        # checked.
        (USE, HEAVY),
    ],
    ids=["name", "star", "use"],
)
def test_importing_and_using_the_op_loads_torch_alone(statement, heavy):
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    result = run_fresh(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_op_works_where_other_packages_do_not_import():
    missing = dict.fromkeys(["triton", "transformers", "reference"])
    result = run_fresh(f"import sys\nsys.modules |= {missing}\n{USE}")
    assert result.returncode == 0, result.stderr


def test_compiled_kernels_need_no_numpy():
    pytest.importorskip("triton")
    result = run_fresh(
        "import os, sys, warnings\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "sys.modules['numpy'] = None\n"
        "warnings.simplefilter('ignore')  # torch warns that numpy is missing\n"
        "import lens_kernels.backends.triton"
    )
    assert result.returncode == 0, result.stderr


def test_the_public_names():
    result = run_fresh(
        "import lens_kernels\n"
        "for name in lens_kernels.__all__: getattr(lens_kernels, name)\n"
        "try: lens_kernels.no_such_name\n"
        "except AttributeError as error: print(error)"
    )
    assert result.returncode == 0, result.stderr
    assert "no_such_name" in result.stdout
