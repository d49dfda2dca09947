"""Approximate unlearning of what the frozen base already knew.

Rules: this room may import `sisa`; `sisa` never imports it. Whatever it produces is an estimate with
a report, never called exact.

Not covered: localisation and editing; deletion of trained records, which is exact and lives in `sisa`.
"""
