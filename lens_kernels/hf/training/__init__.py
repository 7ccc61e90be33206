"""Distillation training: data, objective, Trainer and the ``train`` command."""
