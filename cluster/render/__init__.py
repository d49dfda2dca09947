"""Render results: JSON, text, pictures."""
