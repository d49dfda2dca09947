"""Answering with many adapters in one forward pass."""
