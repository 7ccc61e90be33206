"""Memory that nobody has written."""

import torch


def fill_new_tensors(monkeypatch, value):
    """Let ``torch.empty`` and ``new_empty`` return floating-point tensors filled with ``value``."""

    def filled(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(value) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
