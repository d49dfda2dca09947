"""What an outsider runs: checks of certificates, proofs and logs, offline.

Imports the standard library, `cryptography` and `nacl` alone. Every check raises `envelope.Refused`.
"""
