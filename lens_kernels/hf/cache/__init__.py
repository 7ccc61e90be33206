"""Caches of a teacher's hidden states or sparse targets on disk, to train without the teacher."""
