"""Define the open model that flows work on, and hold what several flows share.

context       the nouns: what is stored, what computes, what is configured
commit        a transaction, recorded in the witness
consistency   a ledger that contradicts itself
plans         the shards' views and plans                areas    names that the ledger lists, by area
slices        records read, embedded and written         served   what is held, served, restricted
group         a ledger of some shards alone              stale_exports  what a deletion marked
"""
