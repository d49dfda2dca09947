"""Where torch lives: base models, embedders, training, answering."""
