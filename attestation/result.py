"""Typed checks, and the attestation result they add up to (RFC 9334 §8.4: Attestation Result).

A verifier walks its list and records every check in a `Checks` book: passed, failed, or skipped with the reason that
the policy gave. Nothing stops at the first failure, so a refusal names all that is wrong. A skip is never a pass; it
appears in the result so that a reader sees what was not looked at.

Only `attestation.verifier` turns a book into an `AttestationResult` (a test holds that road). This file does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, replace
from enum import StrEnum
from typing import Any, Final, Literal, TypeVar

from attestation.ear import ear
from attestation.errors import FormatError, VouchsafeError

__all__ = ["AttestationResult", "Check", "Checks", "Status", "TrustAnchor"]

T = TypeVar("T")

OK: Final = "OK"
SKIPPED: Final = "SKIPPED"


class Status(StrEnum):
    PASS = "pass"  # noqa: S105  # a word, not a password
    FAIL = "fail"
    SKIP = "skip"


# Bound once: a lookup through the class costs more than the check it records.
_PASS, _FAIL, _SKIP = Status.PASS, Status.FAIL, Status.SKIP


@dataclass(frozen=True, slots=True)
class Check:
    """One question asked of the evidence, and its answer.

    id        stable, dotted, lower case: `tdx.td-attributes`
    status    pass, fail, skip
    code      `OK`, `SKIPPED`, or the stable refusal code, `TDX_ATTRIBUTES`
    reason    one line for people: what was checked, or why it failed or was skipped
    expected, actual   short text, hex for bytes
    cite      standard and section that ask for it
    """

    id: str
    status: Status
    code: str
    reason: str
    expected: str = ""
    actual: str = ""
    cite: str = ""

    def as_json(self) -> dict[str, str]:
        return {
            "id": self.id,
            "status": self.status.value,
            "code": self.code,
            "reason": self.reason,
            "expected": self.expected,
            "actual": self.actual,
            "cite": self.cite,
        }


class Checks:
    """The book a verifier writes its checks into. Order is the order of verification; ids may repeat per device."""

    def __init__(self) -> None:
        self._list: list[Check] = []

    def __iter__(self) -> Any:  # Any: iter() of a list of Check, spelled so that `tuple(checks)` stays cheap
        return iter(self._list)

    @property
    def failed(self) -> list[Check]:
        return [c for c in self._list if c.status is _FAIL]

    def add(self, check: Check) -> bool:
        """Record *check*; true when it did not fail."""
        self._list.append(_printable(check))
        return check.status is not _FAIL

    def extend(self, checks: Iterable[Check]) -> None:
        self._list.extend(checks)

    def require(
        self,
        id: str,
        ok: bool,
        *,
        code: str,
        reason: str,
        expected: object = "",
        actual: object = "",
        cite: str = "",
    ) -> bool:
        """Record pass when *ok* is true, else fail with *code*. *reason* says what is asked, in both cases."""
        status = _PASS if ok is True else _FAIL
        return self.add(Check(id, status, OK if ok is True else code, reason, show(expected), show(actual), cite))

    def equal(self, id: str, expected: object, actual: object, *, code: str, reason: str, cite: str = "") -> bool:
        """Record whether *actual* equals *expected*, both shown."""
        same = type(expected) is type(actual) and expected == actual
        return self.require(id, same, code=code, reason=reason, expected=expected, actual=actual, cite=cite)

    def skip(self, id: str, reason: str, *, cite: str = "") -> None:
        """Record that the question was not asked, and why."""
        self.add(Check(id, _SKIP, SKIPPED, reason, cite=cite))

    def fail(self, id: str, error: VouchsafeError, *, cite: str = "") -> None:
        """Record *error* as a failed check with the error's own code."""
        self.add(Check(id, _FAIL, error.code, error.reason, error.expected, error.actual, cite))

    def parse(self, id: str, parser: Callable[[], T], *, reason: str, cite: str = "") -> T | None:
        """Run *parser*; its value and a pass, or None and a failed check when it raises a `FormatError`."""
        try:
            value = parser()
        except FormatError as err:
            self.fail(id, err, cite=cite)
            return None
        self.require(id, True, code=OK, reason=reason, cite=cite)
        return value


@dataclass(frozen=True, slots=True)
class TrustAnchor:
    """A root the verdict rests on. `built_in` is false for one that a policy or a command line named."""

    name: str
    sha256: bytes
    built_in: bool

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "sha256": self.sha256.hex(), "built_in": self.built_in}


_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """What a verifier concludes. Holding one proves that `attestation.verifier` made it, nothing more: read `accepted`.

    verdict       exactly `accepted` or `refused`
    development   true whenever a root other than the compiled-in ones was used, then nothing rests on hardware; and
                  under every policy marked so, which may leave out what a production policy must ask
    checks        every check made, in order
    claims        what follows from an accepted result (names, registers, devices, keys), JSON values only
    not_proven    sentences: what this verdict does not say
    anchors       the roots it rests on
    policy        name and SHA-256 (hex) of the policy text
    verified_at   unix seconds, the verifier's own time
    valid_until   unix seconds: the earliest end of anything the verdict rests on; 0 when refused
    """

    verdict: Literal["accepted", "refused"]
    development: bool
    checks: tuple[Check, ...]
    claims: Mapping[str, Any]  # Any: JSON values
    not_proven: tuple[str, ...]
    anchors: tuple[TrustAnchor, ...]
    policy: tuple[str, str]
    verified_at: int
    valid_until: int
    # Not a field: it is never stored, so neither `dataclasses.replace` nor a copied attribute makes another result.
    _seal: InitVar[object]

    def __post_init__(self, _seal: object) -> None:
        if _seal is not _SEAL:
            raise TypeError("only attestation.verifier makes an AttestationResult")

    @property
    def accepted(self) -> bool:
        return self.verdict == "accepted"

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of the failed checks, in order, each once."""
        return tuple(dict.fromkeys(c.code for c in self.checks if c.status is _FAIL))

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.status is _FAIL)

    def as_json(self) -> dict[str, Any]:  # Any: JSON values
        return {
            "verdict": self.verdict,
            "development": self.development,
            "codes": list(self.codes),
            "checks": [c.as_json() for c in self.checks],
            "claims": dict(self.claims),
            "not_proven": list(self.not_proven),
            "anchors": [a.as_json() for a in self.anchors],
            "policy": {"name": self.policy[0], "sha256": self.policy[1]},
            "verified_at": self.verified_at,
            "valid_until": self.valid_until,
            "ear": ear(self.checks, accepted=self.accepted, policy=self.policy[1], now=self.verified_at),
        }


def conclude(
    checks: Checks,
    *,
    claims: Mapping[str, Any],  # Any: JSON values
    not_proven: Iterable[str],
    anchors: Iterable[TrustAnchor],
    policy: tuple[str, str],
    now: int,
    valid_until: int,
    development: bool,
) -> AttestationResult:
    """Close the book. For `attestation.verifier` alone. A book without a pass is a refusal: nothing was asked.

    Claims of a refused result are dropped, so that nobody reads facts out of evidence that was not accepted."""
    if not checks.failed:
        asked = any(c.status is _PASS for c in checks)
        if not asked:
            checks.require("result.asked", False, code="RESULT_NOTHING_ASKED", reason="at least one check was made")
    book = tuple(checks)
    accepted = not checks.failed
    roots = tuple(anchors)
    return AttestationResult(
        verdict="accepted" if accepted else "refused",
        development=development or any(not a.built_in for a in roots),
        checks=book,
        claims=dict(claims) if accepted else {},
        not_proven=tuple(not_proven),
        anchors=roots,
        policy=policy,
        verified_at=now,
        valid_until=valid_until if accepted else 0,
        _seal=_SEAL,
    )


def _printable(check: Check) -> Check:
    """*check* without control characters: its texts may quote hostile evidence, and end up on a terminal."""
    if check.reason.isprintable() and check.expected.isprintable() and check.actual.isprintable():
        return check
    return replace(
        check, reason=_escaped(check.reason), expected=_escaped(check.expected), actual=_escaped(check.actual)
    )


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def show(value: object) -> str:
    """Render for a person: bytes as hex, sequences joined, long text cut at 200 characters."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [show(v) for v in value]
        text = ", ".join(sorted(parts) if isinstance(value, (set, frozenset)) else parts)
    else:
        text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
