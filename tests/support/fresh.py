"""Programs in a fresh interpreter, the only place that shows which modules an import loads."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import ROOT


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
