"""Approximate unlearning of what the frozen base already knew: a part of deletion-ready-model.

Whatever it produces is an estimate with a report, never called exact. Deletion of trained records is
exact and lives in `sisa`, which this package may import and which never imports it.
"""
