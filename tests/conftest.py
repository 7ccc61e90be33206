"""Every test starts from the same random numbers, whatever ran before it."""

import pytest
import torch

# The products here are small: beside other processes, waiting for a second thread takes longer
# than it saves, up to a second for each test.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260213)
