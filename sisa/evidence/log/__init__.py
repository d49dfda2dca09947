"""A transparency log in the formats of C2SP.

tiles        the files of a log, and hashes and proofs from its tiles
published    reading and checking a published log, one's own or somebody else's
log          a model's own log: appending, proofs, cosignatures
cosigning    cosigning somebody else's log
"""
