"""What methods run with: examples, schedule, the loop, edits, bounds and cost."""
