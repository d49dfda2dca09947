"""Nouns and ports: errors, digests, records, jobs, events, and a Protocol for each effect."""
