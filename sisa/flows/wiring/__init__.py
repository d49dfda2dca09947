"""Build what flows use from a model directory."""
