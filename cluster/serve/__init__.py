"""Answers and requests over HTTP, on Ray Serve."""
