"""What is measured of a model's answers: one metric a file, pure, with its formula and its source."""
