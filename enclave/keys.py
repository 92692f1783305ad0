"""The only holder of private keys (import contract `one-road-to-the-keys`): TLS keys and the receipt key.

Runs in the enclave. A key is born here, lives in this process's memory and is never written, printed, copied or
pickled; what others get is an operation: mint the leaf, install into an OpenSSL context, sign a receipt. One TLS key
per certificate, freed with the certificate's last connection; one receipt key per boot, replaced within 24 hours. A
receipt key never doubles as a TLS key.
"""

from __future__ import annotations

import hashlib
from typing import Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL

from attestation.claims import Claims
from attestation.ratls import build_leaf

__all__ = ["CertificateKey", "KeyRing", "ReceiptKey"]

RECEIPT_KEY_LIFETIME: Final = 23 * 3600
"""Seconds. A receipt key must be gone before it is 24 hours old (receipts facts §3); certificates live one hour."""


class _Secret:
    """No way out: no text, no copy, no pickle."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a private key does not leave this process")

    def __copy__(self) -> NoReturn:
        raise TypeError("a private key is not copied")

    def __deepcopy__(self, _memo: object) -> NoReturn:
        raise TypeError("a private key is not copied")


class CertificateKey(_Secret):
    """The P-256 key of one certificate. `spki` is its DER SubjectPublicKeyInfo."""

    __slots__ = ("__key", "__minted", "spki")

    def __init__(self) -> None:
        self.__key = ec.generate_private_key(ec.SECP256R1())
        self.__minted = False
        self.spki = self.__key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def leaf(self, claims: Claims, quote: bytes, gpu: bytes | None) -> bytes:
        """The one leaf (DER) of this key. Raises `FormatError` when it is too long, ValueError the second time."""
        if self.__minted:
            raise ValueError("one key serves one certificate")
        self.__minted = True
        return build_leaf(self.__key, claims, quote, gpu)

    def install(self, context: SSL.Context, leaf: bytes) -> None:
        """Give key and *leaf* to OpenSSL. The context holds its own copy, freed with its last connection."""
        context.use_certificate(x509.load_der_x509_certificate(leaf))
        context.use_privatekey(self.__key)
        context.check_privatekey()


class ReceiptKey(_Secret):
    """The Ed25519 key that signs receipts. `public` is 32 bytes, `key_id` names it in keysets and receipts."""

    __slots__ = ("__key", "born", "key_id", "public")

    def __init__(self, now: int) -> None:
        self.__key = Ed25519PrivateKey.generate()
        self.born = now
        self.public = self.__key.public_key().public_bytes_raw()
        self.key_id = f"receipt-{hashlib.sha256(self.public).hexdigest()[:16]}"

    def sign(self, message: bytes) -> bytes:
        """Ed25519 over *message* (a receipt's JCS form), 64 bytes."""
        return self.__key.sign(message)


class KeyRing:
    """Where keys come from. One per boot."""

    __slots__ = ("_receipt",)

    def __init__(self) -> None:
        self._receipt: ReceiptKey | None = None

    def certificate_key(self) -> CertificateKey:
        """A new key, for exactly one certificate."""
        return CertificateKey()

    def receipt_key(self, now: int) -> ReceiptKey:
        """The receipt key for a certificate made at *now* (unix seconds): the last one, unless it is too old."""
        if self._receipt is None or not 0 <= now - self._receipt.born < RECEIPT_KEY_LIFETIME:
            self._receipt = ReceiptKey(now)
        return self._receipt
