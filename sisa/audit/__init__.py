"""Looking at a model from outside: verify, doctor, repair, garbage, residue."""
