"""Pictures of the logit lens's predictions for texts, at every depth of one or more models."""
