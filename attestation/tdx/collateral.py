"""Collateral: what Intel says about a platform, as one JSON object (`QuoteCollateralV3` of dcap-qvl).

Endorsements in the words of RFC 9334. They arrive stapled to evidence or from a cache: untrusted until `appraise` has
checked signatures, roles, dates. TCB info and QE identity are kept as the exact text that Intel signed; the views
beside them are read from that text. `pck_certificate_chain` is dropped: in the library it would replace the chain
inside the quote, so that whoever staples collateral could choose the certificate (tdx facts §4.3).

Pure. Holding a `Collateral` proves its form only.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from attestation.errors import FormatError
from attestation.tdx.pem import read_chain, write_chain

__all__ = ["MAX_COLLATERAL", "Collateral", "QeIdentity", "TcbInfo"]

MAX_COLLATERAL: Final = 256 * 1024
"""Bytes of JSON. Collateral seen is 16 to 24 KB."""

KEYS: Final = (
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
)
_DROPPED: Final = "pck_certificate_chain"
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True, slots=True)
class TcbInfo:
    """What the checks need of the TCB info. Dates in unix seconds."""

    id: str
    version: int
    issue_date: int
    next_update: int
    fmspc: bytes
    pce_id: bytes
    tcb_type: int
    evaluation: int


@dataclass(frozen=True, slots=True)
class QeIdentity:
    """What the checks need of the QE identity. Dates in unix seconds."""

    id: str
    version: int
    issue_date: int
    next_update: int
    evaluation: int


@dataclass(frozen=True, slots=True)
class Collateral:
    """Parsed collateral.

    tcb_info_text, qe_identity_text             exact signed JSON text
    tcb_info_signature, qe_identity_signature   r ‖ s, 64 bytes
    root_ca_crl, pck_crl                        DER
    …_issuer_chain                              one to four certificates, DER, signer first; `appraise` wants two
    """

    pck_crl_issuer_chain: tuple[bytes, ...] = field(repr=False)
    root_ca_crl: bytes = field(repr=False)
    pck_crl: bytes = field(repr=False)
    tcb_info_issuer_chain: tuple[bytes, ...] = field(repr=False)
    tcb_info_text: str = field(repr=False)
    tcb_info_signature: bytes = field(repr=False)
    qe_identity_issuer_chain: tuple[bytes, ...] = field(repr=False)
    qe_identity_text: str = field(repr=False)
    qe_identity_signature: bytes = field(repr=False)
    tcb_info: TcbInfo
    qe_identity: QeIdentity

    @property
    def evaluation(self) -> int:
        """tcbEvaluationDataNumber, the smaller of TCB info and QE identity."""
        return min(self.tcb_info.evaluation, self.qe_identity.evaluation)

    @classmethod
    def parse(cls, json_bytes: bytes) -> Collateral:
        """Read the JSON object. Raises `FormatError` (`FORMAT_TDX_COLLATERAL…`)."""
        if len(json_bytes) > MAX_COLLATERAL:
            raise _bad("it is too long", f"<= {MAX_COLLATERAL} bytes", len(json_bytes))
        return _parse(bytes(json_bytes))

    def to_json(self) -> bytes:
        """The same collateral in its one spelling: these nine keys in this order, hex in lower case, no white space."""
        value = {
            "pck_crl_issuer_chain": write_chain(self.pck_crl_issuer_chain).decode(),
            "root_ca_crl": self.root_ca_crl.hex(),
            "pck_crl": self.pck_crl.hex(),
            "tcb_info_issuer_chain": write_chain(self.tcb_info_issuer_chain).decode(),
            "tcb_info": self.tcb_info_text,
            "tcb_info_signature": self.tcb_info_signature.hex(),
            "qe_identity_issuer_chain": write_chain(self.qe_identity_issuer_chain).decode(),
            "qe_identity": self.qe_identity_text,
            "qe_identity_signature": self.qe_identity_signature.hex(),
        }
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@lru_cache(maxsize=8)
def _parse(json_bytes: bytes) -> Collateral:
    """Remembered: the same collateral serves every connection for days, and the answer depends on the bytes alone."""
    top = _object(json_bytes, "collateral")
    top.pop(_DROPPED, None)
    if set(top) != set(KEYS):
        raise _bad("other keys than these", ", ".join(KEYS), ", ".join(sorted(map(str, top)))[:160])
    for key, value in top.items():
        if not isinstance(value, str) or not value.isascii():
            raise _bad(f"{key} is not ASCII text", "text", type(value).__name__)
    return Collateral(
        pck_crl_issuer_chain=_chain(top, "pck_crl_issuer_chain"),
        root_ca_crl=_hex(top, "root_ca_crl", None),
        pck_crl=_hex(top, "pck_crl", None),
        tcb_info_issuer_chain=_chain(top, "tcb_info_issuer_chain"),
        tcb_info_text=top["tcb_info"],
        tcb_info_signature=_hex(top, "tcb_info_signature", 64),
        qe_identity_issuer_chain=_chain(top, "qe_identity_issuer_chain"),
        qe_identity_text=top["qe_identity"],
        qe_identity_signature=_hex(top, "qe_identity_signature", 64),
        tcb_info=_tcb_info(top["tcb_info"]),
        qe_identity=_qe_identity(top["qe_identity"]),
    )


def _bad(why: str, expected: object = "", actual: object = "") -> FormatError:
    return FormatError("FORMAT_TDX_COLLATERAL", f"collateral cannot be read: {why}", expected=expected, actual=actual)


def _object(text: bytes | str, what: str) -> dict[str, Any]:  # Any: JSON values, each checked where it is used
    """A JSON object without a key that stands twice, which two readers might read differently."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _bad(f"a key stands twice in {what}")
        return found

    # The inner objects stand under Intel's signature and the library refuses a field that stands twice.
    hook = once if isinstance(text, bytes) else None
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as err:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _bad(f"{what} is not JSON in UTF-8") from err
    if not isinstance(value, dict):
        raise _bad(f"{what} is not an object", "object", type(value).__name__)
    return value


def _chain(top: dict[str, Any], key: str) -> tuple[bytes, ...]:
    text = top[key].encode("ascii")
    if not text.endswith(b"\n"):
        text += b"\n"  # as some proxies hand it over; the certificates are the same
    return read_chain(text, 1, 4, code="FORMAT_TDX_COLLATERAL_CHAIN", what=key)


def _hex(top: dict[str, Any], key: str, size: int | None) -> bytes:
    text: str = top[key]
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if not value or value.hex() != text or (size is not None and len(value) != size):  # one spelling: lower case
        raise _bad(
            f"{key} is not lower-case hex", f"{size} bytes" if size else "whole bytes", f"{len(text)} characters"
        )
    return value


def _text(view: dict[str, Any], key: str, pattern: str) -> str:
    value = view.get(key)
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise _bad(f"{key} is missing or another kind", pattern, str(value)[:60])
    return value


def _number(view: dict[str, Any], key: str) -> int:
    value = view.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise _bad(f"{key} is missing or another kind", "a whole number", str(value)[:60])
    return value


def _date(view: dict[str, Any], key: str) -> int:
    text = _text(view, key, _DATE.pattern)
    try:
        return int(datetime.fromisoformat(text.removesuffix("Z")).replace(tzinfo=UTC).timestamp())
    except ValueError as err:
        raise _bad(f"{key} is no date", "RFC 3339, UTC", text) from err


def _tcb_info(text: str) -> TcbInfo:
    view = _object(text, "tcb_info")
    return TcbInfo(
        id=_text(view, "id", r"[A-Z_]{1,16}"),
        version=_number(view, "version"),
        issue_date=_date(view, "issueDate"),
        next_update=_date(view, "nextUpdate"),
        fmspc=bytes.fromhex(_text(view, "fmspc", r"[0-9a-fA-F]{12}")),
        pce_id=bytes.fromhex(_text(view, "pceId", r"[0-9a-fA-F]{4}")),
        tcb_type=_number(view, "tcbType"),
        evaluation=_number(view, "tcbEvaluationDataNumber"),
    )


def _qe_identity(text: str) -> QeIdentity:
    view = _object(text, "qe_identity")
    return QeIdentity(
        id=_text(view, "id", r"[A-Z_]{1,16}"),
        version=_number(view, "version"),
        issue_date=_date(view, "issueDate"),
        next_update=_date(view, "nextUpdate"),
        evaluation=_number(view, "tcbEvaluationDataNumber"),
    )
