"""The command ``lens-kernels train`` with DeepSpeed on CPUs, as test_deepspeed.py runs it.

The arguments are those of the command. The environment needs ``DS_ACCELERATOR=cpu``.
"""

from __future__ import annotations

import sys

import torch

from lens_kernels import cli
from tests.support.deepspeed_run import use_gloo

if __name__ == "__main__":
    torch.set_num_threads(1)
    use_gloo()
    sys.exit(cli.main(sys.argv[1:]))
