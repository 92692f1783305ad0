"""Who a connection talks to: one certificate with its evidence (`Identity`), and one TLS connection under it.

Runs in the enclave. Types only: `enclave.issuer` makes identities, `enclave.tls` makes connections, the API reads
both from `scope["vouchsafe"]`. No private key is reachable from here but through two narrow things: a context that
OpenSSL alone uses, and a signer of receipts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from OpenSSL import SSL

from attestation.binding import EXPORTER_LABEL
from attestation.claims import Claims

__all__ = ["Connection", "Identity", "ReceiptSigner"]


class ReceiptSigner(Protocol):
    """Signs receipts under the key that a keyset names. `enclave.keys` holds the key."""

    @property
    def key_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes:
        """Ed25519 over *message*, 64 bytes."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """One certificate of this enclave and everything said about it.

    Holding one proves that the enclave's own verifier accepted its evidence under the appraisal policy when it was
    made. Old identities live as long as a connection or a receipt needs them; their key does no new handshake.

    leaf            DER of the certificate
    claims, claims_bytes   what the quote covers
    key_hash        SHA-384 of the SPKI, 48 bytes
    keyset          JCS bytes of the `aci/1` keyset of exactly this certificate; keyset_digest `sha256:<hex>`
    not_before, not_after  unix seconds, equal in claims and X.509
    event_log       as the claims' digest covers it;  provenance  what the release manifest says of the image
    evidence_bundle the deterministic bundle of ratls.md §3.5
    """

    leaf: bytes = field(repr=False)
    claims: Claims = field(repr=False)
    claims_bytes: bytes = field(repr=False)
    key_hash: bytes
    keyset: bytes = field(repr=False)
    keyset_digest: str
    not_before: int
    not_after: int
    event_log: bytes = field(repr=False)
    provenance: Mapping[str, str | None] = field(repr=False)
    evidence_bundle: bytes = field(repr=False)
    receipt_signer: ReceiptSigner = field(repr=False)
    context: SSL.Context = field(repr=False)

    def bundle(self) -> bytes:
        """Evidence and endorsements as served to anybody."""
        return self.evidence_bundle


class Connection:
    """One TLS connection that this process terminates. In every ASGI scope as `scope["vouchsafe"]`."""

    __slots__ = ("__weakref__", "_tls", "identity")

    def __init__(self, identity: Identity, tls: SSL.Connection) -> None:
        self.identity = identity
        self._tls = tls

    def __repr__(self) -> str:
        return f"Connection(keyset={self.identity.keyset_digest})"

    def exporter(self, nonce: bytes) -> bytes:
        """TLS-Exporter(`EXPORTER-vouchsafe-conn-v1`, context = *nonce*, 32) of this very connection (RFC 8446 §7.5).

        Taken from the enclave's own socket, never from a caller: a binder that somebody sends is not signed."""
        if len(nonce) != 32:
            raise ValueError(f"the nonce has 32 bytes, not {len(nonce)}")
        return self._tls.export_keying_material(EXPORTER_LABEL, 32, nonce)

    @property
    def group(self) -> str:
        """The negotiated key exchange group, `X25519MLKEM768` where both ends have it; empty when unknown."""
        return self._tls.get_group_name() or ""
