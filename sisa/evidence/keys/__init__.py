"""What signs a model's evidence.

keys               the keys of a model: on disk, by its run file, and on an open model
signers            signers outside these files: agents, tokens, services
vrf_key            labels of records, and their proofs
model_signature    `model.sig`, which signs the files of an export
"""
