"""Define the commands that give evidence to outsiders, and check it.

keys          keys                          log          log
certificates  certificate, receipt, verify-certificate
proofs        prove, verify-proof           audits       audit, rebuild
revocations   revocations, check-adapter    published    what these read of a published log
"""
