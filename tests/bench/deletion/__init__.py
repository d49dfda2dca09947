"""What a deletion costs, against training everything again."""
