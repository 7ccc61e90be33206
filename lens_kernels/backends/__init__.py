"""The backends. Each is a function ``evaluate(call)`` that returns losses and gradients."""
