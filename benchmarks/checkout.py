"""Makes the checkout importable for scripts that are run by their path without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
