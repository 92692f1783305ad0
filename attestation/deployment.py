"""Who runs an enclave (ratls facts §3.8): the operator's deployment statement, and the status list that revokes.

Evidence says which program runs, not for whom. An attacker with the same image elsewhere, or here with a configuration
of his own, has no statement that lists it. Both documents are DSSE envelopes signed with Ed25519 by keys that a client
pins; this file reads and writes their payloads, and tells whether a claim is covered. Pure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import rfc8785

from attestation.claims import Role, dns_name
from attestation.errors import FormatError
from attestation.strict_json import count, exact, listed, load, short

__all__ = [
    "DEPLOYMENT_PAYLOAD_TYPE",
    "MAX_STATEMENT_LIFETIME",
    "MAX_STATUS_LIFETIME",
    "STATUS_PAYLOAD_TYPE",
    "DeploymentStatement",
    "Platform",
    "SerialFloor",
    "StatusList",
    "new_statement",
    "new_status_list",
    "salted",
]

DEPLOYMENT_PAYLOAD_TYPE: Final = "application/vnd.vouchsafe.deployment+json"
STATUS_PAYLOAD_TYPE: Final = "application/vnd.vouchsafe.status+json"
MAX_STATEMENT: Final = 128 * 1024
MAX_STATEMENT_LIFETIME: Final = 7 * 86400
MAX_STATUS_LIFETIME: Final = 3600
MAX_LISTED: Final = 1024

_HEX32: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform by its instance id or PPID, salted so that a public statement is no fleet inventory."""

    type: Literal["piid", "ppid"]
    salted: bytes


@dataclass(frozen=True, slots=True)
class DeploymentStatement:
    """What the operator vouches for. Worth something only under a pinned operator key.

    configs, releases   SHA-256 digests of measured configurations and of release manifest payloads
    gpus                salted IK serials, or None when the statement does not restrict GPUs
    """

    operator: str
    serial: int
    not_before: int
    not_after: int
    dns_names: tuple[str, ...]
    roles: frozenset[str]
    configs: frozenset[bytes]
    releases: frozenset[bytes]
    salt: bytes
    platforms: tuple[Platform, ...]
    gpus: frozenset[bytes] | None

    @classmethod
    def parse(cls, payload: bytes) -> DeploymentStatement:
        """`FORMAT_DEPLOYMENT` for anything else; a lifetime beyond seven days is malformed too."""
        try:
            return cls._parse(load(payload, MAX_STATEMENT, "deployment statement"))
        except FormatError as err:
            raise FormatError("FORMAT_DEPLOYMENT", err.reason, expected=err.expected, actual=err.actual) from None

    @classmethod
    def _parse(cls, t: dict[str, Any]) -> DeploymentStatement:  # Any: JSON values, each checked
        needed = frozenset(
            {
                "version", "operator", "serial", "notBefore", "notAfter", "dnsNames", "roles", "configs", "releases",
                "salt", "platforms",
            }
        )  # fmt: skip
        exact(t, needed, needed | {"gpus"}, "deployment statement")
        if t["version"] is True or t["version"] != 1:
            raise FormatError("FORMAT_DEPLOYMENT", "version", expected=1, actual=t["version"])
        start, end = count(t["notBefore"], "notBefore"), count(t["notAfter"], "notAfter")
        if not 0 < end - start <= MAX_STATEMENT_LIFETIME:
            raise FormatError("FORMAT_DEPLOYMENT", "lifetime", expected="at most 7 days", actual=f"{end - start} s")
        operator = short(t["operator"], "operator")
        if operator is None:
            raise FormatError("FORMAT_DEPLOYMENT", "operator", expected="a name", actual="null")
        roles = frozenset(map(str, listed(t["roles"], "roles")))
        if not roles or not roles <= {"both", "model", "gateway"}:
            raise FormatError("FORMAT_DEPLOYMENT", "roles", expected="both, model, gateway", actual=sorted(roles))
        names = tuple(dns_name(n) for n in listed(t["dnsNames"], "dnsNames"))
        if not names:
            raise FormatError("FORMAT_DEPLOYMENT", "dnsNames", expected="at least one name", actual="none")
        return cls(
            operator=operator,
            serial=count(t["serial"], "serial"),
            not_before=start,
            not_after=end,
            dns_names=names,
            roles=roles,
            configs=_digests(t["configs"], "configs"),
            releases=_digests(t["releases"], "releases"),
            salt=_hex32(t["salt"], "salt"),
            platforms=tuple(_platform(p) for p in listed(t["platforms"], "platforms", limit=MAX_LISTED)),
            gpus=_digests(t["gpus"], "gpus") if "gpus" in t else None,
        )

    def covers_platform(self, piid: bytes | None, ppid: bytes) -> bool:
        """Whether the quote's platform is listed."""
        ids = {"piid": piid, "ppid": ppid}
        return any((value := ids[p.type]) is not None and salted(self.salt, value) == p.salted for p in self.platforms)


@dataclass(frozen=True, slots=True)
class StatusList:
    """What the operator or a release signer takes back. An expired list refuses; a missing one too, if required."""

    serial: int
    issued_at: int
    next_update: int
    releases: frozenset[bytes]
    configs: frozenset[bytes]
    platforms: frozenset[bytes]
    gpus: frozenset[bytes]
    statements: frozenset[bytes]
    keys: frozenset[bytes]

    @classmethod
    def parse(cls, payload: bytes) -> StatusList:
        """`FORMAT_STATUS` for anything else; a window beyond an hour is malformed too."""
        try:
            t = load(payload, MAX_STATEMENT, "status list")
            lists = ("releases", "configs", "platforms", "gpus", "statements", "keys")
            names = frozenset({"version", "serial", "issuedAt", "nextUpdate", *lists})
            exact(t, names, names, "status list")
            issued, update = count(t["issuedAt"], "issuedAt"), count(t["nextUpdate"], "nextUpdate")
            if t["version"] is True or t["version"] != 1 or not 0 < update - issued <= MAX_STATUS_LIFETIME:
                raise FormatError(
                    "FORMAT_STATUS", "window", expected="version 1, at most 1 h", actual=f"{update - issued} s"
                )
            return cls(
                count(t["serial"], "serial"), issued, update, *(_digests(t[k], k, empty=True) for k in lists)
            )  # fmt: skip
        except FormatError as err:
            raise FormatError("FORMAT_STATUS", err.reason, expected=err.expected, actual=err.actual) from None


@dataclass(frozen=True, slots=True)
class SerialFloor:
    """Highest serials accepted before, of one operator's statements and status lists; None for one not seen yet.
    A client keeps them: an older document, well signed and still in its dates, may be one that was withdrawn."""

    statement: int | None = None
    status: int | None = None

    def merge(self, other: SerialFloor) -> SerialFloor:
        """The higher of both, for each kind."""

        def top(a: int | None, b: int | None) -> int | None:
            return b if a is None else a if b is None else max(a, b)

        return SerialFloor(top(self.statement, other.statement), top(self.status, other.status))


def salted(salt: bytes, identifier: bytes) -> bytes:
    """SHA-256(salt ‖ identifier): how statements and status lists name platforms and GPUs."""
    return hashlib.sha256(salt + identifier).digest()


def new_statement(
    *,
    operator: str,
    serial: int,
    not_before: int,
    not_after: int,
    dns_names: Sequence[str],
    roles: Sequence[Role],
    configs: Sequence[bytes],
    releases: Sequence[bytes],
    salt: bytes,
    platforms: Sequence[tuple[Literal["piid", "ppid"], bytes]],
    gpus: Sequence[bytes] | None = None,
) -> bytes:
    """Payload (JCS) of a deployment statement. *platforms* and *gpus* are given plain and stored salted."""
    document: dict[str, Any] = {  # Any: JSON values
        "version": 1,
        "operator": operator,
        "serial": serial,
        "notBefore": not_before,
        "notAfter": not_after,
        "dnsNames": sorted(dns_names),
        "roles": sorted(roles),
        "configs": sorted(c.hex() for c in configs),
        "releases": sorted(r.hex() for r in releases),
        "salt": salt.hex(),
        "platforms": [{"type": kind, "salted": salted(salt, value).hex()} for kind, value in platforms],
    }
    if gpus is not None:
        document["gpus"] = sorted(salted(salt, g).hex() for g in gpus)
    payload = rfc8785.dumps(document)
    DeploymentStatement.parse(payload)
    return payload


def new_status_list(
    *,
    serial: int,
    issued_at: int,
    next_update: int,
    releases: Sequence[bytes] = (),
    configs: Sequence[bytes] = (),
    platforms: Sequence[bytes] = (),
    gpus: Sequence[bytes] = (),
    statements: Sequence[bytes] = (),
    keys: Sequence[bytes] = (),
) -> bytes:
    """Payload (JCS) of a status list. *platforms* and *gpus* are salted already, with the statement's salt.

    While several statements are in force, each has a salt of its own: list a platform once per statement, or deny the
    older statements too. *keys* are public keys or their SHA-256."""
    denied = {
        "releases": releases,
        "configs": configs,
        "platforms": platforms,
        "gpus": gpus,
        "statements": statements,
        "keys": keys,
    }
    payload = rfc8785.dumps(
        {
            "version": 1,
            "serial": serial,
            "issuedAt": issued_at,
            "nextUpdate": next_update,
            **{name: sorted(v.hex() for v in values) for name, values in denied.items()},
        }
    )
    StatusList.parse(payload)
    return payload


def _platform(value: object) -> Platform:
    names = frozenset({"type", "salted"})
    exact(value, names, names, "platforms")
    assert isinstance(value, dict)
    if value["type"] not in ("piid", "ppid"):
        raise FormatError("FORMAT_DEPLOYMENT", "platform type", expected="piid or ppid", actual=value["type"])
    return Platform(value["type"], _hex32(value["salted"], "salted"))


def _hex32(value: object, what: str) -> bytes:
    if not isinstance(value, str) or not _HEX32.fullmatch(value):
        raise FormatError("FORMAT_DEPLOYMENT", what, expected="32 bytes in hex", actual=type(value).__name__)
    return bytes.fromhex(value)


def _digests(value: object, what: str, *, empty: bool = False) -> frozenset[bytes]:
    values = listed(value, what, limit=MAX_LISTED)
    if not values and not empty:
        raise FormatError("FORMAT_DEPLOYMENT", what, expected="at least one digest", actual="none")
    return frozenset(_hex32(v, what) for v in values)
