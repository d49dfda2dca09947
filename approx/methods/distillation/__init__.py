"""Distillation: learn a distribution over the next token from which the forget answer is removed."""
