"""The backends, and the code that they share. A backend is a function ``evaluate(call)``."""
