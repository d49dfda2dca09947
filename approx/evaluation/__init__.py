"""Evaluation of models: TOFU, its log and aggregates, scores of answers, and the probe of the base."""
