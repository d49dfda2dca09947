"""Progress, logs, metrics and curves."""
