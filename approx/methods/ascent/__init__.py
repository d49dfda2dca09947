"""Ascent: make the forget answers less likely, each token by its own weight."""
