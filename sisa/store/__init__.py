"""Bytes at rest, each kind behind its port of `core/ports.py`.

ledger/           where records are: tables in SQLite or PostgreSQL
blobs/            named bytes, and the keys that seal them: what the stores below are made of
areas             names of the storage areas, and where each is
records           slices of records          checkpoints    stages and patches
index             vectors                    hidden_states  of the frozen layers, cached
vault             texts kept by consent      exports        adapters outside the model
metrics           numbers of runs            witness        deletions, outside the model
"""
