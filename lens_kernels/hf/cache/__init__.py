"""A cache of the teacher's hidden states on disk, so that later epochs need no teacher."""
