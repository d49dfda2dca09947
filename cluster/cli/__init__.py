"""Define the commands of `sisa`, one module for each command family."""
