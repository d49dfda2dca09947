"""Evaluation of models: questions and their log, answers and their scores, and the probe of the base."""
