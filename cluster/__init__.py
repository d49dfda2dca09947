"""The running system: the command line and the Ray executor over `sisa`."""
