"""The workload keyset of `aci/1`: the keys of one certificate, and the digest that quote, claims and receipts name.

A keyset is the identity of a service for receipts. It is believed only when its digest stands in verified evidence.
Ours name exactly one TLS key and one receipt key. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from attestation.strict_json import HEX32, ID, bad, count, exact, jcs, listed, load, short, text

__all__ = ["Keyset", "keyset_digest", "keyset_document"]

MAX_KEYSET: Final = 64 << 10


def keyset_digest(jcs_bytes: bytes) -> str:
    """`sha256:<hex>` over the JCS form of a keyset: the identity that quotes and receipts name."""
    return "sha256:" + hashlib.sha256(jcs_bytes).hexdigest()


def keyset_document(
    subject: str | None,
    not_after: int,
    receipt_key_id: str,
    receipt_public: bytes,
    spki_sha256: bytes,
    domain: str | None,
) -> dict[str, Any]:  # Any: JSON values
    """The workload keyset of one certificate: its receipt key and the SHA-256 of its SPKI, 32 bytes each.

    not_after   unix seconds, end of the certificate plus drain
    """
    if len(receipt_public) != 32 or len(spki_sha256) != 32:
        raise ValueError("a receipt key and an SPKI digest are 32 bytes each")
    tls: dict[str, Any] = {"spki_sha256": spki_sha256.hex()}
    if domain is not None:
        tls["domain"] = domain
    key = {"key_id": receipt_key_id, "algo": "ed25519", "public_key": receipt_public.hex()}
    return {
        "subject": subject,
        "not_after": not_after,
        "receipt_signing_keys": [key],
        "e2ee_public_keys": [],
        "tls_public_keys": [tls],
    }


@dataclass(frozen=True, slots=True)
class Keyset:
    """A workload keyset, parsed. Holding one proves nothing: its digest must be the one that verified evidence names.

    digest        `sha256:<hex>` over its JCS form
    not_after     unix seconds
    signing_keys  key_id → Ed25519 public key (32 bytes); entries of other algorithms are left out, as the draft asks
    tls           (SHA-256 of the SPKI, domain or None), in order
    """

    digest: str
    subject: str | None
    not_after: int
    signing_keys: Mapping[str, bytes]
    tls: tuple[tuple[bytes, str | None], ...]

    @classmethod
    def parse(cls, raw: bytes) -> Keyset:
        """Parse the document in any JSON encoding; the digest is over its JCS form. FormatError when malformed."""
        doc = load(raw, MAX_KEYSET, "keyset")
        members = {"subject", "not_after", "receipt_signing_keys", "e2ee_public_keys", "tls_public_keys"}
        exact(doc, members, members, "keyset")
        signing = _keys(doc["receipt_signing_keys"], "receipt_signing_keys")
        _keys(doc["e2ee_public_keys"], "e2ee_public_keys")
        tls: list[tuple[bytes, str | None]] = []
        for entry in listed(doc["tls_public_keys"], "tls_public_keys"):
            exact(entry, {"spki_sha256"}, {"spki_sha256", "domain"}, "tls_public_keys")
            spki = text(entry["spki_sha256"], HEX32, "spki_sha256")
            tls.append((bytes.fromhex(spki), short(entry["domain"], "domain") if "domain" in entry else None))
        return cls(
            digest=keyset_digest(jcs(doc)),
            subject=short(doc["subject"], "subject"),
            not_after=count(doc["not_after"], "not_after"),
            signing_keys=signing,
            tls=tuple(tls),
        )


def _keys(value: object, what: str) -> dict[str, bytes]:
    """`key_id → public key` of the ed25519 entries. Two entries of one id would make the signer ambiguous: refused."""
    found: dict[str, bytes] = {}
    seen: set[str] = set()
    for entry in listed(value, what):
        names = {"key_id", "algo", "public_key"}
        exact(entry, names, names, what)
        key_id = text(entry["key_id"], ID, "key_id")
        if key_id in seen:
            bad(what, expected="distinct key ids")
        seen.add(key_id)
        if short(entry["algo"], "algo") == "ed25519":
            found[key_id] = bytes.fromhex(text(entry["public_key"], HEX32, "public_key"))
    return found
