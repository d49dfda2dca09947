"""Build the `Context` that flows use from a model directory.

wiring        a model directory's real parts; found by name: `upper_houses`
resources     the base and the embedder, resolved on first use
moving        a ledger to another place
progress      what is shown on standard error
"""
