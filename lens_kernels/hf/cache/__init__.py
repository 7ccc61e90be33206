"""Caches of a teacher's hidden states or sparse targets, to train without running the teacher."""
