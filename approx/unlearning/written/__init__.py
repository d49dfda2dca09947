"""What is written for a run: a retain set, and the three kinds of preferred answers."""
