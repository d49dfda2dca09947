"""Define `sisa eval`: one command for each benchmark, and the attacks."""
