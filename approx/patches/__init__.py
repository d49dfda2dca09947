"""Patches: from texts in the vault to an adapter beneath all shards, and its report."""
