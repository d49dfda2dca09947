"""How fast shards are trained."""
