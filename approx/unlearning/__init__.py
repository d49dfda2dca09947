"""What methods run with: examples, schedule, the loop, bounds and cost, causal tracing, saved runs."""
