"""What the commands of `vouchsafe` share: reading files and times, printing verdicts, exit statuses.

0 accepted, 1 refused (or nothing there to accept), 2 usage. Output first says the verdict. With `--json` exactly one
JSON document goes to stdout. Errors end with a hint and never with a traceback.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from attestation.client.handshake import NotAttested
from attestation.client.report import Paint, printable, render, render_beside
from attestation.client.session import read_policy
from attestation.errors import InputError, PolicyError, VouchsafeError
from attestation.policy import Policy, platform_policy
from attestation.result import AttestationResult

__all__ = [
    "ACCEPTED",
    "REFUSED",
    "USAGE",
    "emit",
    "fail",
    "moment",
    "paint",
    "policy_of",
    "read_policy_of",
    "read_file",
    "say",
    "seconds",
    "show",
    "write_file",
]

ACCEPTED: Final = 0
REFUSED: Final = 1
USAGE: Final = 2

MAX_FILE: Final = 64 * 1024 * 1024
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def emit(document: object) -> None:
    """The one JSON document of a command."""
    say(json.dumps(document, indent=2, ensure_ascii=True))


def paint() -> Paint:
    return Paint(sys.stdout.isatty())


def show(
    result: AttestationResult,
    options: Namespace,
    subject: str,
    *,
    beside: Mapping[str, Mapping[str, object]] | None = None,
) -> int:
    """Print *result* and return the exit status, which is that of *result* alone.

    beside   what others said about the same evidence: it is shown, and decides nothing"""
    beside = beside or {}
    if options.json:
        emit({"subject": subject, **result.as_json(), **beside})
    else:
        say(render(result, subject=subject, paint=paint()))
        for name, said in beside.items():
            say(render_beside(name, said, paint()))
    return ACCEPTED if result.accepted else REFUSED


def fail(error: VouchsafeError | NotAttested, options: Namespace, subject: str = "") -> int:
    """Print *error* and return the exit status: 2 for the user's own input, else 1."""
    if isinstance(error, NotAttested):
        if error.result is not None:
            return show(error.result, options, subject)
        error = error.failure
    usage = isinstance(error, InputError | PolicyError)
    if getattr(options, "json", False):
        told = {"code": error.code, "reason": error.reason, "expected": error.expected, "actual": error.actual}
        body: dict[str, Any] = {"error": {**told, "hint": error.hint}}  # Any: JSON values
        emit(body if usage else {"subject": subject, "verdict": "refused", "codes": [error.code], **body})
    else:
        word = "error" if usage else "REFUSED"
        sys.stderr.write(printable(f"{word}  {error}\n  hint: {error.hint or _HINTS[usage]}\n"))
    return USAGE if usage else REFUSED


_HINTS: Final = {True: "`vouchsafe COMMAND --help` shows what is expected", False: "nothing was sent to this service"}


def moment(text: str) -> int:
    """`--at`: unix seconds, or RFC 3339 with an offset. Raises `InputError`."""
    if re.fullmatch(r"[0-9]{1,11}", text):
        return int(text)
    if _RFC3339.fullmatch(text):
        try:
            return int(datetime.fromisoformat(text.upper().replace(" ", "T").replace("Z", "+00:00")).timestamp())
        except (ValueError, OverflowError):
            pass
    raise InputError(
        "INPUT_TIME",
        "not a time",
        expected="unix seconds, or RFC 3339 such as 2026-11-24T18:00:00Z",
        actual=text,
    )


def read_file(path: str | Path, what: str, limit: int = MAX_FILE) -> bytes:
    """The bytes of the user's own file. Raises `InputError`."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as err:
        raise InputError("INPUT_FILE", f"cannot read the {what}: {err.strerror or err}", actual=str(path)) from err
    if len(raw) > limit:
        raise InputError("INPUT_FILE", f"the {what} is too long", expected=f"<= {limit} bytes", actual=str(path))
    return raw


def write_file(path: str | Path, raw: bytes, what: str) -> None:
    try:
        Path(path).write_bytes(raw)
    except OSError as err:
        raise InputError("INPUT_FILE", f"cannot write the {what}: {err.strerror or err}", actual=str(path)) from err


def read_policy_of(options: Namespace) -> Policy | None:
    """`--policy` with its `--exception`, None without one."""
    if not options.policy:
        if getattr(options, "exception", None):
            raise InputError("INPUT_USAGE", "--exception needs --policy: a policy names who may grant exceptions")
        return None
    policy = read_policy(Path(options.policy))
    if getattr(options, "exception", None):
        policy = replace(policy, exception=read_file(options.exception, "exception", 512 * 1024))
    return policy


def policy_of(options: Namespace) -> Policy:
    """`--policy`, or the built-in policy `platform`."""
    return read_policy_of(options) or platform_policy()


def seconds(text: str) -> int:
    """A duration such as `30m`, `24h` or `7d`."""
    match = re.fullmatch(r"([0-9]{1,5})([smhd])", text)
    if match is None:
        raise InputError("INPUT_TIME", "not a duration", expected="such as 30m, 24h or 7d", actual=text)
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
