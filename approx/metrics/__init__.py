"""Metrics of a model's answers: pure functions with their formula, source and limits."""
