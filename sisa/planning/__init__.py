"""Pure decisions: where records go, what to serve and train, what it costs.

layout              the shard and the slice of a record
bands               slices by the risk of deletion
orders              orders in which a shard's slices are trained
plan                what to serve, train and retire
cost                record-epochs, and seconds
checkpoint_budget   which checkpoints to keep when not all fit
hidden_state_files  names of the files with cached hidden states
batching            whether requests run now, or together with later ones
patch_plan          which patches there should be, and their texts
layout_advice       costs of each choice of a layout, by closed forms
deletion_stream     deletions by counts, replayed
"""
