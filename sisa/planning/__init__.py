"""Pure decisions: where records go, what to serve and to train, what it costs."""
