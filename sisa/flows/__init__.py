"""Effects in their order: train, add, delete, reconcile, answer, export."""
