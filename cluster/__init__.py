"""Run `sisa` on Ray and from the command line: a part of deletion-ready-model."""
