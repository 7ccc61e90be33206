"""Runs programs in a new interpreter, in which no modules are loaded."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import ROOT


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
