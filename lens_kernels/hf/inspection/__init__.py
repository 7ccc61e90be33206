"""Pictures of what the logit lens predicts at every depth of one or more models."""
