"""Training and evaluation as tasks on Ray."""
