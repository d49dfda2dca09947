"""Build the `Context` that flows use from a model directory.

model_directory  an open model, and the lock of its writer
wiring           a model directory's real parts; found by name: `upper_houses`
resources        the base and the embedder, resolved on first use
ledger_place     where the ledger is, and its writer lock   moving       a ledger to another place
keys             keys and the witness                       description  what a model says it is
executors        what trains, patches and probes, by name   scratch_base  a base from scratch
progress         what is shown on standard error
"""
