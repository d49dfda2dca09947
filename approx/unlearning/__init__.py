"""Run a method of unlearning: examples, schedule, the loop, edits, bounds and cost."""
