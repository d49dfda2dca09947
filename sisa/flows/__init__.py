"""Effects in their order: train, add, delete, reconcile, export.

ingest           add, correct or train records       record_checks    refuse records, with every problem
requests         requests, until they are carried out
deletion         delete records, or plan it          reconcile        the rest, whatever happened before
chains           train stages, in any process        reconfigure      move a model to another run file
restored_backup  delete again what a backup brings   status           what is held and served
locations        where records are, what they touch  candidates       find records by content
export           adapters for other tools

`context` is what flows work on, and `wiring` opens it; `answers`, `patches` and `rights` are flows, too.
"""
