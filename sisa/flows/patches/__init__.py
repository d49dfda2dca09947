"""Patches beneath the shards, as deletions and callers meet them."""
