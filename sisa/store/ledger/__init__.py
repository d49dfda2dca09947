"""The ledger, in SQL.

ledger            the port: queries, and one commit for each change
database          snapshots, and checked rows as objects
tables            the columns, from the nouns of `core/`
rows              reads and writes of rows, with checksums and counts
backend           what differs between `sqlite` and `postgres`
migrations/       upgrades of an older ledger
"""
