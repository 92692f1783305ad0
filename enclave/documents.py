"""What the host lays into the guest's directories: signed statements, and endorsements. All of it is untrusted.

Runs in the enclave. The host can withhold, delay and damage these files, and nothing more: statements are believed by
their signatures, endorsements by theirs, and the enclave's own verifier judges both before a certificate is used.
Every read has a cap, so that a file of the host's choosing cannot fill the guest's memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.dsse import MAX_ENVELOPE, Envelope
from attestation.endorsements import Endorsements
from attestation.errors import FormatError, InputError

__all__ = ["Statements", "read_endorsements", "read_statements"]

MAX_COLLATERAL: Final = 512 * 1024
MAX_RIM: Final = 128 * 1024
MAX_OCSP: Final = 16 * 1024
MAX_FILES: Final = 256
MAX_TOTAL: Final = 3 * 1024 * 1024  # a bundle has at most 4 MiB


@dataclass(frozen=True, slots=True)
class Statements:
    """The three envelopes as they lie there, b"" where absent, and the digests of two payloads.

    release     SHA-256 of the release manifest's payload;  deployment  of the deployment statement's, None without one
    """

    release_raw: bytes
    deployment_raw: bytes
    status_raw: bytes
    release: bytes
    deployment: bytes | None

    @property
    def digest(self) -> bytes:
        """Changes when any of the three does."""
        parts = (self.release_raw, self.deployment_raw, self.status_raw)
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).digest()


def read_statements(folder: Path) -> Statements:
    """Read `release.json` (required), `deployment.json`, `status.json`. Raises `InputError`."""
    release = _read(folder / "release.json", MAX_ENVELOPE)
    if not release:
        raise InputError(
            "INPUT_STATEMENTS",
            f"there is no release manifest in {folder}",
            expected="release.json",
            hint="the host lays the signed manifest there; see docs/operate.md",
        )
    deployment = _read(folder / "deployment.json", MAX_ENVELOPE)
    return Statements(
        release_raw=release,
        deployment_raw=deployment,
        status_raw=_read(folder / "status.json", MAX_ENVELOPE),
        release=_digest(release, "release.json"),
        deployment=_digest(deployment, "deployment.json") if deployment else None,
    )


def read_endorsements(folder: Path) -> Endorsements:
    """Read `collateral.json`, `rims/<id>.xml`, `ocsp/<name>.der`. Raises `InputError` for too many."""
    collateral = _read(folder / "collateral.json", MAX_COLLATERAL)
    rims = _named(folder / "rims", ".xml", MAX_RIM)
    ocsp = _named(folder / "ocsp", ".der", MAX_OCSP)
    total = len(collateral) + sum(map(len, rims.values())) + sum(map(len, ocsp.values()))
    if total > MAX_TOTAL:
        raise InputError("INPUT_ENDORSEMENTS", f"{folder} holds too much", expected=f"<= {MAX_TOTAL}", actual=total)
    return Endorsements(collateral, rims, ocsp)


def _named(folder: Path, suffix: str, limit: int) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    names = sorted(p for p in folder.iterdir() if p.suffix == suffix and not p.name.startswith("."))
    if len(names) > MAX_FILES:
        raise InputError("INPUT_ENDORSEMENTS", f"{folder} holds too many files", expected=f"<= {MAX_FILES}")
    return {p.name.removesuffix(suffix): _read(p, limit) for p in names}


def _read(path: Path, limit: int) -> bytes:
    """All of *path*, b"" when it is not there."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as err:
        raise InputError("INPUT_DOCUMENT", f"cannot read {path}: {err.strerror}") from err
    if len(raw) > limit:
        raise InputError("INPUT_DOCUMENT", f"{path} is too long", expected=f"<= {limit} bytes")
    return raw


def _digest(raw: bytes, name: str) -> bytes:
    try:
        return Envelope.parse(raw).digest
    except FormatError as err:
        raise InputError("INPUT_STATEMENTS", f"{name} is no DSSE envelope: {err.reason}") from err
