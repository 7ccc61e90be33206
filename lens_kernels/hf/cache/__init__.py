"""The teacher's hidden states on disk, so that later epochs never run the teacher."""
