"""All methods on one task, at equal cost."""
