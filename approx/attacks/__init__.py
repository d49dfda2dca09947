"""Attacks on forgetting, one per file: what comes back, and what gives a text away."""
