"""`vouchsafe verify TARGET --first-use FILE`: look at a service, write down who it says it is, explain a change, ask.

Exploration: no policy is satisfied by it, and the words say so. Exit status 0 needs an accepted platform verdict and
an identity that is the recorded one or that the user has just said yes to.
"""

from __future__ import annotations

import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from attestation.client.cli_common import ACCEPTED, REFUSED, emit, paint, policy_of, say, show
from attestation.client.first_use import Change, Identity, Meeting, Meetings, changes, identify
from attestation.client.report import printable, render_checks, render_not_proven, short
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.errors import InputError, RefusedError
from attestation.policy import Policy, Skip
from attestation.result import AttestationResult

__all__ = ["explore"]

WORDS: Final = "explored, not appraised: deployment"


def explore(options: Namespace, target: Target) -> int:
    """One platform verdict, then who the service says it is, beside whom it was before."""
    policy = _unpinned(policy_of(options))
    meetings = Meetings(Path(options.first_use))
    met = meetings.get(target.origin)
    if met is None and not options.yes and not _terminal():
        raise InputError(
            "INPUT_FIRST_USE",
            "there is nobody to ask whether this is the service meant",
            expected="a terminal, or --yes",
            hint="--yes records the first use unasked; a later change is never taken that way",
        )
    cache = Path(options.cache) if options.cache else None
    session = AttestedSession(target, policy, explore=True, cache_dir=cache)
    result = session.verify_once()
    if not result.accepted:
        return show(result, options, target.origin)
    bundle = session.bundle(bytes.fromhex(result.claims["leaf"]))
    if bundle is None:  # one of many certificates since; cannot be within one connection
        raise RefusedError("EVIDENCE_NONE", "the evidence that was accepted is no longer at hand")
    now = int(time.time())
    return _Visit(options, target.origin, meetings, met, policy, result, identify(result, bundle), now).end()


def _unpinned(policy: Policy) -> Policy:
    if not isinstance(policy.deployment, Skip):
        raise InputError(
            "INPUT_FIRST_USE",
            f"policy {policy.name} pins the operator: nothing is left to trust on first use",
            hint="verify under the policy alone; first use is for services whose operator you cannot name yet",
        )
    return policy


class _Visit:
    """What was found, what it is compared with, and how it is told."""

    def __init__(
        self,
        options: Namespace,
        origin: str,
        meetings: Meetings,
        met: Meeting | None,
        policy: Policy,
        result: AttestationResult,
        identity: Identity,
        now: int,
    ) -> None:
        self._options, self._origin, self._meetings, self._met = options, origin, meetings, met
        self._result, self._identity, self._now = result, identity, now
        self._unappraised = isinstance(policy.release, Skip)
        self._changes = changes(met.identity, identity) if met else ()
        self._state = "new" if met is None else "changed" if self._changes else "unchanged"

    def end(self) -> int:
        self._tell_before()
        if self._state == "unchanged":
            assert self._met is not None
            return self._tell(self._met)
        try:
            self._confirm()
        except RefusedError as err:
            if not self._options.json:
                raise
            emit(self._document(self._met, refused=err))
            return REFUSED
        kept = Meeting(self._met.first if self._met else self._now, self._now, self._identity)
        self._meetings.keep(self._origin, kept)
        return self._tell(kept)

    def _tell(self, kept: Meeting) -> int:
        if self._options.json:
            emit(self._document(kept))
        else:
            say("\n".join(self._rest(kept)))
        return ACCEPTED

    def _confirm(self) -> None:
        """Return when the user takes the service for the one meant. Raises `RefusedError`."""
        if self._state == "new":
            if self._options.yes or _asked("Record this as the service you meant"):
                return
            raise RefusedError(
                "FIRST_USE_DECLINED", "not recorded: you did not say yes", hint="nothing was sent and nothing kept"
            )
        aspects = ", ".join(c.aspect for c in self._changes)
        # --yes is no answer here: what runs unattended would take any change.
        if _terminal() and _asked(f"Changed: {aspects}. Is it still the service you meant"):
            return
        raise RefusedError(
            "FIRST_USE_CHANGED",
            f"it is not what it was: {aspects}",
            expected="; ".join(f"{c.aspect} {', '.join(c.was) or 'none'}" for c in self._changes),
            actual="; ".join(f"{c.aspect} {', '.join(c.now) or 'none'}" for c in self._changes),
            hint="ask the operator; on a terminal this command asks whether you take the change",
        )

    # for people

    def _tell_before(self) -> None:
        """What the user must read before answering; with `--json` on the other channel, and only if asked."""
        text = "\n".join([self._headline(), *self._who(), *_differences(self._changes)])
        if not self._options.json:
            say(text)
        elif self._state != "unchanged" and _terminal():
            sys.stderr.write(text + "\n")

    def _headline(self) -> str:
        mark = "  DEVELOPMENT: nothing here rests on hardware" if self._result.development else ""
        words = f"CHANGED since {_date(self._met.since)}" if self._changes and self._met else "EXPLORED"
        return f"{paint()(words, 'skip')}  {self._origin}  {WORDS}{mark}"

    def _who(self) -> list[str]:
        policy = short(self._result.policy[0])
        lines = [f"  platform  accepted under policy {policy}; no policy says whose service this must be", ""]
        own = "operator, release, configuration, names and models are" if self._unappraised else "the operator is"
        return [*lines, f"  who it says it is; {own} in its own words", *_table(self._identity)]

    def _rest(self, kept: Meeting) -> list[str]:
        words = {
            "new": f"recorded in {self._options.first_use}",
            "unchanged": f"unchanged since {_date(kept.since)}, first met {_date(kept.first)}",
            "changed": f"the change is recorded in {self._options.first_use}; first met {_date(kept.first)}",
        }
        lines = ["", f"  {printable(words[self._state])}"]
        return lines + render_checks(self._result.checks, paint()) + render_not_proven(self._result, paint())

    # for machines

    def _document(self, kept: Meeting | None, refused: RefusedError | None = None) -> dict[str, Any]:
        # Any: JSON values
        told = {
            "verdict": "refused" if refused else WORDS,
            "codes": [refused.code] if refused else [],
            "state": self._state,
            "first": kept.first if kept else None,
            "since": kept.since if kept else None,
            "identity": asdict(self._identity),
            "changes": {c.aspect: {"was": c.was, "now": c.now} for c in self._changes},
        }
        return {"subject": self._origin, "explored": told, "platform": self._result.as_json()}


def _table(identity: Identity) -> list[str]:
    named: Mapping[str, Sequence[str]] = {f.name: getattr(identity, f.name) for f in fields(Identity)}
    return [line for name, values in named.items() for line in _row(name, values)]


def _row(name: str, values: Sequence[str]) -> list[str]:
    return [
        f"    {name if i == 0 else '':14} {short(value, 160)}"
        for i, value in enumerate(values or ["none that it names"])
    ]


def _differences(found: Sequence[Change]) -> list[str]:
    lines = ["", f"  {paint()('changed', 'fail')}"] if found else []
    for change in found:
        for word, values in (("was", change.was), ("now", change.now)):
            text = printable(", ".join(values) or "none").replace("\n", " ")
            name = f"    {change.aspect if word == 'was' else '':14} {word} "
            lines += textwrap.wrap(
                text, 110, initial_indent=name, subsequent_indent=" " * len(name), break_on_hyphens=False
            )
    return lines


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _asked(question: str) -> bool:
    """Only a plain yes is one; the end of input and an interrupt are not."""
    sys.stderr.write(f"{question}? [y/N] ")
    sys.stderr.flush()
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except UnicodeDecodeError:
        return False


def _date(moment: int) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return str(moment)
