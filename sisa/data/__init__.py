"""Records in: readers, samples, temporary files."""
