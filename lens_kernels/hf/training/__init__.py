"""A distillation: data, objective, Trainer, and the command that runs them."""
