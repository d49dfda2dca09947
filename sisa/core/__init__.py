"""Nouns and ports: errors, digests, records, jobs, events, runs, and a Protocol for each effect."""
