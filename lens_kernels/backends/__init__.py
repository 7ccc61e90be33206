"""The ways to evaluate a call. Each module offers ``evaluate(call) -> Evaluation``."""
