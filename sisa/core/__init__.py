"""The nouns and the ports: errors, digests, records, jobs, events, and each effect as a Protocol."""
