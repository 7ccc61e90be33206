"""How good a student is: the objective's parts on held-out text, and its answers scored."""
