"""What signs a model's evidence.

model_keys         making, finding and rotating the keys of a model
keys               the keys in their directory
signing            envelopes, and key files of others
signers            signers outside these files: agents, tokens, services
vrf_key            labels of records, and their proofs
model_signature    `model.sig`, which signs the files of an export
"""
