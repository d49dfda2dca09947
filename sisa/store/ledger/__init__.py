"""The ledger, in SQL.

ledger            the port: queries, and one commit for each change
database          snapshots, and checked rows as objects
rows              the tables; checksums and counts of rows
backend           what differs between `sqlite` and `postgres`
migrations/       upgrades of an older ledger
"""
