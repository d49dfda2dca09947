"""One module a command family: its arguments and what it runs."""
