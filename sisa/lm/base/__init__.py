"""The frozen base and adapters on it: weights, tokens, numerics."""
