"""Pictures of what the logit lens predicts for texts, at every depth of one or more models."""
