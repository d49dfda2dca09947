"""Benchmarks and what they ask: TOFU, its log and its aggregates."""
