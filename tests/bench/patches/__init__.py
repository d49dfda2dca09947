"""Whether a patch makes the base forget."""
