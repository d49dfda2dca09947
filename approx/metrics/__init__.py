"""Metrics of a model's answers, one per file: pure functions with their formula, source and limits."""
