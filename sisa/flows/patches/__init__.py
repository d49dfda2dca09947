"""Patches beneath the shards, as deletions and callers meet them.

patching      wished for, made and reverted
vault_sets    the texts that they are made from
on_deletion   kept in step with deletions
composition   their effect on the shards' answers
"""
