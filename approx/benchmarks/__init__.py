"""The benchmarks of unlearning: each reads its questions, and makes its measures of a log."""
