"""Define the commands: one module for each command family, with its arguments and what it runs."""
