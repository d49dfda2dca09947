"""The unlearning loop: examples, schedule, bounds, cost and report."""
