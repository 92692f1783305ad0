"""TDX: read a quote, judge it. Pure functions of bytes, policy and time; see `appraise` for the list of checks."""

from attestation.tdx.appraise import CrlNumbers, Registers, TdxFacts, appraise
from attestation.tdx.collateral import Collateral, QeIdentity, TcbInfo
from attestation.tdx.quote import QeReport, Quote, TdReport, canonical_length

__all__ = [
    "Collateral",
    "CrlNumbers",
    "QeIdentity",
    "QeReport",
    "Quote",
    "Registers",
    "TcbInfo",
    "TdReport",
    "TdxFacts",
    "appraise",
    "canonical_length",
]
