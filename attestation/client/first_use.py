"""Trust on first use, for exploration alone: who a service says it is, written down, and compared the next time.

What is recorded follows from evidence that was accepted under a policy which pins no operator. Measurements, platform
and devices are what the hardware vouches for. Operator, release, configuration, names and models are the words of what
runs there, and worth as much as that: the operator's are self-asserted even where the policy pins the release. A record
says whom one met, never whom one meant: it satisfies no policy, and no user data flows under it.
The file is the user's own; what stands in it is read strictly, and a damaged one is an error, never an empty one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from attestation.bundle import Bundle
from attestation.claims import Claims
from attestation.deployment import DEPLOYMENT_PAYLOAD_TYPE, DeploymentStatement
from attestation.dsse import Envelope
from attestation.errors import FormatError, InputError, RefusedError
from attestation.ratls import Leaf
from attestation.reference_values import RELEASE_PAYLOAD_TYPE, ReleaseManifest
from attestation.result import AttestationResult
from attestation.strict_json import count, exact, listed, load, short
from attestation.tdx import Quote
from attestation.tdx.certificates import pck_extension, read_certificate

__all__ = ["MARK", "Change", "Identity", "Meeting", "Meetings", "changes", "identify"]

MARK: Final = "vouchsafe-first-use"
"""First member of the file: by it a reader of policies can say what it was given."""
MAX_FILE: Final = 1 << 20
MAX_LINE: Final = 1000

_KEY_ID: Final = re.compile(r"[0-9A-Za-z:+/=._-]{1,128}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a service says it is, each aspect as lines for people. What that is worth: see the module's docstring.

    operator       name and key ids of the deployment statement that the quote commits to; empty without one
    release        SHA-256 of the manifest's payload, and the name and version in it
    configuration  SHA-256 of the measured configuration
    names, models  DNS names; model ids with their weights' digests
    measurements   MRTD and RTMR0 to 2: the image. RTMR3 follows from release, configuration and models
    platform       platform instance id, or PPID
    devices        kind, model and identity serial of GPUs and switches
    roots          the trust anchors it rests on
    """

    operator: tuple[str, ...]
    release: tuple[str, ...]
    configuration: tuple[str, ...]
    names: tuple[str, ...]
    models: tuple[str, ...]
    measurements: tuple[str, ...]
    platform: tuple[str, ...]
    devices: tuple[str, ...]
    roots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One aspect that is not what it was."""

    aspect: str
    was: tuple[str, ...]
    now: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """A service as it was met: first of all, and since when under this identity (unix seconds)."""

    first: int
    since: int
    identity: Identity


def identify(result: AttestationResult, bundle: Bundle) -> Identity:
    """The identity behind an accepted *result*, out of the bundle of the same certificate.

    Raises `RefusedError` when the bundle is of another certificate, or its documents are not those the quote names;
    `FormatError` when they cannot be read."""
    evidence = bundle.evidence
    if hashlib.sha256(evidence.leaf).hexdigest() != result.claims.get("leaf"):
        # A refused result has no claims.
        raise RefusedError("EVIDENCE_LEAF", "an identity follows from the evidence that was accepted, and no other")
    leaf = Leaf.parse(evidence.leaf)
    claims = Claims.decode(leaf.extension.claims)
    tdx = result.claims["tdx"]
    devices = result.claims.get("gpu", {}).get("devices", [])
    found = Identity(
        operator=_operator(evidence.deployment, claims.deployment),
        release=_release(evidence.release, claims.release),
        configuration=(f"sha256:{claims.config.hex()}",),
        names=claims.dns_names,
        models=tuple(f"{m.id} {m.weights}" for m in claims.models),
        measurements=(f"mrtd {tdx['mrtd']}", *(f"rtmr{i} {r}" for i, r in enumerate(tdx["rtmrs"][:3]))),
        platform=_platform(Quote.parse(leaf.extension.quote)),
        devices=tuple(f"{d['kind']} {d['hwmodel']} {d['serial']}" for d in devices),
        roots=tuple(f"{a.name} sha256:{a.sha256.hex()}" for a in result.anchors),
    )
    if any(len(line) > MAX_LINE for f in fields(found) for line in getattr(found, f.name)):
        raise FormatError("FORMAT_FIRST_USE", "a name is too long to be written down", expected=f"<= {MAX_LINE}")
    return found


def changes(was: Identity, now: Identity) -> tuple[Change, ...]:
    """What is different, aspect by aspect; empty when nothing is."""
    pairs = ((f.name, getattr(was, f.name), getattr(now, f.name)) for f in fields(Identity))
    return tuple(Change(name, a, b) for name, a, b in pairs if a != b)


def _operator(raw: bytes, digest: bytes | None) -> tuple[str, ...]:
    """The envelope's key ids are words of whoever wrote it: without a pinned key no signature can be checked."""
    if digest is None:
        return ()
    envelope = _named(raw, digest, DEPLOYMENT_PAYLOAD_TYPE, "deployment statement")
    ids = [s.get("keyid") or "unnamed" for s in load(raw, len(raw), "DSSE envelope")["signatures"]]
    if not all(_KEY_ID.fullmatch(i) for i in ids):
        raise FormatError("FORMAT_DSSE", "a key id of the deployment statement is none", expected=_KEY_ID.pattern)
    return (DeploymentStatement.parse(envelope.payload).operator, *sorted(f"key {i}" for i in set(ids)))


def _release(raw: bytes, digest: bytes) -> tuple[str, ...]:
    manifest = ReleaseManifest.parse(_named(raw, digest, RELEASE_PAYLOAD_TYPE, "release manifest").payload)
    return f"sha256:{digest.hex()}", f"{manifest.name} {manifest.version}"


def _named(raw: bytes, digest: bytes, payload_type: str, what: str) -> Envelope:
    """The document that the quote commits to: who carries evidence could otherwise put any name in its place."""
    envelope = Envelope.parse(raw)
    if envelope.digest != digest or envelope.payload_type != payload_type:
        raise RefusedError(
            "EVIDENCE_DIGEST",
            f"the {what} is not the one the quote commits to",
            expected=digest,
            actual=envelope.digest,
            hint="try again: the bundle was put together out of two certificates, or somebody changed it",
        )
    return envelope


def _platform(quote: Quote) -> tuple[str, ...]:
    sgx = read_certificate(quote.pck_chain[0]).sgx
    if sgx is None:
        raise FormatError("FORMAT_TDX_CERTIFICATE", "the platform's certificate has no SGX extension")
    pck = pck_extension(sgx)
    # A Processor CA's certificate has no instance id.
    return (f"piid:{pck.platform_instance_id.hex()}" if pck.platform_instance_id else f"ppid:{pck.ppid.hex()}",)


class Meetings:
    """The file of services met, by origin (`https://name[:port]`). Mode 0600, replaced in one step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, origin: str) -> Meeting | None:
        """None for a service not met yet. Raises `InputError` for a file that is not one of these."""
        return self._read().get(origin)

    def keep(self, origin: str, meeting: Meeting) -> None:
        """Write *meeting* down, beside those of other services. Raises `InputError`."""
        known = self._read()
        known[origin] = meeting
        rows = {name: _as_json(m) for name, m in known.items()}
        raw = json.dumps({MARK: 1, "services": rows}, indent=1, ensure_ascii=True).encode("ascii") + b"\n"
        self._parse(raw)  # what a service calls itself must not make a file that cannot be read again
        self._replace(raw)

    def _read(self) -> dict[str, Meeting]:
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_FILE + 1)
        except FileNotFoundError:
            return {}
        except OSError as err:
            raise self._bad(err.strerror or str(err)) from err
        return self._parse(raw)

    def _parse(self, raw: bytes) -> dict[str, Meeting]:
        try:
            top = load(raw, MAX_FILE, "record of first use")
            exact(top, {MARK, "services"}, {MARK, "services"}, "record of first use")
            if top[MARK] is True or top[MARK] != 1 or not isinstance(top["services"], dict):
                raise FormatError("FORMAT_FIRST_USE", "another version, or no services")
            return {origin: _meeting(row) for origin, row in top["services"].items()}
        except FormatError as err:
            raise self._bad(err.reason) from err

    def _replace(self, raw: bytes) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            made = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(made, "wb") as file:
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    beside.unlink()
        except OSError as err:
            raise InputError(
                "INPUT_FILE", f"cannot write the record of first use: {err.strerror or err}", actual=str(self._path)
            ) from err

    def _bad(self, why: str) -> InputError:
        return InputError(
            "INPUT_FIRST_USE",
            f"this is no record of first use that can be read: {why}",
            actual=str(self._path),
            hint="name another file; to start anew, move this one away",
        )


def _as_json(meeting: Meeting) -> dict[str, Any]:  # Any: JSON values
    return {"first": meeting.first, "since": meeting.since, **asdict(meeting.identity)}


def _meeting(row: Mapping[str, Any]) -> Meeting:  # Any: JSON values, each checked
    aspects = {f.name for f in fields(Identity)}
    names = {"first", "since", *aspects}
    exact(row, names, names, "service")
    lines = {name: tuple(_line(v) for v in listed(row[name], name)) for name in aspects}
    return Meeting(count(row["first"], "first"), count(row["since"], "since"), Identity(**lines))


def _line(value: object) -> str:
    line = short(value, "line")
    if line is None:
        raise FormatError("FORMAT_FIRST_USE", "a line is text")
    return line
