"""Build what flows use from a model directory, and hold what several flows share.

wiring        a model directory's real parts, as a `Context`; found by name: `upper_houses`
context       the nouns: what is stored, what computes, what is configured
resources     the base and the embedder, resolved on first use
commit        a transaction, recorded in the witness; `witness` catches up after a restored backup
plans         the shards' views and plans                areas    names that the ledger lists, by area
slices        records read, embedded and written         served   what is held, served, restricted
group         a ledger of some shards alone              moving   a ledger to another place
progress      what is shown on standard error
"""
