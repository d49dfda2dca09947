"""Answering with many adapters, and the embedders that route prompts to them."""
