"""A student and its teacher, drawn through the logit lens of every depth."""
