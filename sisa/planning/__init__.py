"""Pure decisions: where records go, what to serve and train, what it costs."""
