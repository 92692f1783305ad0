"""Adapters that fetch evidence from hardware: they run in the enclave, and no other code here touches devices."""

from attestation.attester.base import AttesterError, QuoteProvider, TeeAttester

__all__ = ["AttesterError", "QuoteProvider", "TeeAttester"]
