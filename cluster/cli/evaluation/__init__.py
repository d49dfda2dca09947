"""Measure what models know: one command a benchmark, and the attacks."""
