"""``lens_kernels.hf`` imports each of its modules only when a program uses a name from it."""

from tests.support.fresh import run_fresh

PROGRAM = """
import sys
from lens_kernels import hf
assert set(hf.__all__) <= set(dir(hf))
assert "transformers" not in sys.modules
from lens_kernels.hf import lens_head_from
assert "transformers.trainer" not in sys.modules
for name in hf.__all__:
    assert getattr(hf, name).__name__ == name
assert "transformers.trainer" in sys.modules
try:
    hf.no_such_name
except AttributeError as error:
    print(error)
"""


def test_hf_imports_a_name_when_it_is_used():
    result = run_fresh(PROGRAM)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "module 'lens_kernels.hf' has no attribute 'no_such_name'\n"
