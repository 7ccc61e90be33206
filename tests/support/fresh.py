"""Programs in a new interpreter, in which no modules are loaded yet."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import ROOT


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter that turns user warnings into errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
