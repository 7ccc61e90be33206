"""Every test starts from the same random numbers, whatever ran before it."""

import os

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, chosen when they are imported. Its products
# are numpy's, which wait for a second thread as torch's do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The products here are small: beside other processes, waiting for a second thread takes longer
# than it saves, up to a second for each test.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260213)
