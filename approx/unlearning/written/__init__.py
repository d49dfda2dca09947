"""What the base writes for a run: a retain set, other answers, and labels of what it would say."""
