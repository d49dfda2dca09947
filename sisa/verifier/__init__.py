"""What an outsider runs: checks of certificates, proofs and logs, offline.

    envelope          strict JSON, signed envelopes, the file of public keys
    merkle, note      the transparency log: trees, checkpoints, tiles, proofs
    certificate       certificates, receipts, and the chain of statements in a log
    vrf, membership   whether a model holds a record
    feed              which adapters deletions revoked

Imports the standard library, `cryptography` and `nacl` alone. Every check raises `envelope.Refused`.
"""
