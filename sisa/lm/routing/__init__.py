"""Routing: which records are near a prompt, and which shards answer it."""
