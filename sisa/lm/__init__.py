"""The language model: the only code that imports torch."""
