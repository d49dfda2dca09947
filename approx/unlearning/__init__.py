"""The unlearning loop: examples, methods' interface, stopping, cost, report."""
