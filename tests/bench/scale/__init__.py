"""What holds for a million records and more."""
