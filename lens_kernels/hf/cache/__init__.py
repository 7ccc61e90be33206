"""The teacher's hidden states on disk, so that later epochs need not run the teacher."""
