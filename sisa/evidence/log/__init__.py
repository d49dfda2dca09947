"""The transparency log of a model's evidence, in the formats of C2SP."""
