"""Bytes at rest: records, checkpoints, index and ledger, each behind its port."""
