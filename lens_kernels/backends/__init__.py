"""The backends: functions ``evaluate(call)`` that return losses and gradients, and shared code."""
