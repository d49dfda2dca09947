"""How results read: JSON, words, pictures."""
