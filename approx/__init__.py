"""Approximate unlearning of what the frozen base already knew: a part of deletion-ready-model.

Everything here is an estimate and is never called exact. Deletion of trained records is exact and lives
in `sisa`, which does not import this package.
"""
