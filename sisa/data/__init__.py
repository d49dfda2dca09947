"""Records on their way in: readers, rules, samples."""
