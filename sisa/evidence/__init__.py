"""Evidence of deletions for outsiders: keys, transparency log, certificates, membership proofs."""
