"""The meeting place of the zones: evidence, endorsements, policy, verification, RA-TLS formats, receipts.

Its verifier core does no I/O and takes the time as an argument (see the import contracts in pyproject.toml).
"""
