"""Nouns and ports.

domain            records, slices, checkpoints, exports
patches           patches and the vault's sets
requests          a request for deletion, and its life          event_chain   links of its events
ports             a Protocol for each effect                    hooks         on a deletion
errors            the error tree                                events        what flows report
digest            canonical bytes and digests                   block         strict pydantic models
run               the name of a run                             ledger_meta   keys of the ledger's `meta`
checkpoint_files  names of the files of a checkpoint
"""
