"""The smallest use of an installed package, run without this checkout."""

import sys

import torch

from lens_kernels import symmetric_lens_loss

student = torch.randn(3, 4, requires_grad=True)
loss = symmetric_lens_loss(student, torch.randn(3, 5), torch.randn(7, 4), torch.randn(7, 5))
loss.backward()
assert loss > 0 and student.grad.abs().sum() > 0
sys.stdout.write(f"{sys.modules['lens_kernels'].__file__}\n")
