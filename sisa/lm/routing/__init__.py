"""Which shards answer a prompt.

embedder       vectors of texts
names          the names in a text, as half of its vector
lookup         the ways to look a prompt up, and the nearest records
route          from hits to shards and their weights, or to the base alone
calibration    the choice of `min_score` on public prompts
"""
