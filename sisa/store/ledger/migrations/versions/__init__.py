"""Revisions of the ledger's tables, each named after the schema that it makes."""
