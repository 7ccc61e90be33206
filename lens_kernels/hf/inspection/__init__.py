"""Pictures of the predictions that the logit lens gives at every depth of two models."""
