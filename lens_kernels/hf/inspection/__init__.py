"""Pictures of a text's predictions by the logit lens, at every depth of two models."""
