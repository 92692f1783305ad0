"""For small programs: the service as the environment names it, and a refusal that ends the program in a few lines.

    with exit_on_refusal():
        session = session_from_env()  # VOUCHSAFE_TARGET, VOUCHSAFE_POLICY; VOUCHSAFE_CONNECT and VOUCHSAFE_CACHE
        ...                           # any library with `session.context()`, or OpenAI(http_client=client_for(session))
        print(verdict(session))

Nothing here decides anything: the session does, under the policy file that was named. A larger program makes its own
`AttestedSession` and catches what its library raises (`handshake.find` tells the refusal among the causes).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attestation.client.handshake import NotAttested, find
from attestation.client.report import printable, short
from attestation.client.session import AttestedSession, read_policy
from attestation.client.target import Target, parse_address
from attestation.errors import InputError, PolicyError, VouchsafeError

if TYPE_CHECKING:
    from attestation.client.openai import AsyncAttestedClient, AttestedClient

__all__ = ["async_client_for", "client_for", "exit_on_refusal", "session_from_env", "verdict"]


def session_from_env(environ: Mapping[str, str] = os.environ) -> AttestedSession:
    """The service that the environment names, under the policy that it names. Dials nothing yet.

    VOUCHSAFE_TARGET   https://NAME[:PORT]
    VOUCHSAFE_POLICY   policy file; there is no default: without one nothing says whose service this must be
    VOUCHSAFE_CONNECT  HOST:PORT to dial when DNS does not know the name (optional)
    VOUCHSAFE_CACHE    directory where evidence is kept between runs (optional)

    Raises `InputError` or `PolicyError`: what is missing or cannot be used, and how it should look."""
    connect, cache = environ.get("VOUCHSAFE_CONNECT"), environ.get("VOUCHSAFE_CACHE")
    target = Target.parse(_required(environ, "VOUCHSAFE_TARGET"), parse_address(connect) if connect else None)
    policy = read_policy(_required(environ, "VOUCHSAFE_POLICY"))
    return AttestedSession(target, policy, cache_dir=Path(cache) if cache else None)


def client_for(session: AttestedSession) -> AttestedClient:
    """What `OpenAI(http_client=…)` takes, over this session: see `openai.attested_client`. Receipts are verified."""
    from attestation.client.openai import attested_client  # httpx2 only where it is needed

    return attested_client(session.target, policy=session.policy, session=session)


def async_client_for(session: AttestedSession) -> AsyncAttestedClient:
    """What `AsyncOpenAI(http_client=…)` takes, over this session."""
    from attestation.client.openai import async_attested_client

    return async_attested_client(session.target, policy=session.policy, session=session)


def verdict(session: AttestedSession) -> str:
    """One line about the latest connection: accepted or refused, by whom it is operated, and DEVELOPMENT if so."""
    result = session.last_result
    if result is None:
        return f"not verified yet: {session.target.origin}"
    operator = result.claims.get("operator") or "not appraised"
    development = "  DEVELOPMENT: nothing here rests on hardware" if result.development else ""
    line = f"{result.verdict}: {session.target.origin}, operator {operator}, {len(result.checks)} checks{development}"
    return printable(line).replace("\n", " ")


@contextlib.contextmanager
def exit_on_refusal() -> Iterator[None]:
    """End the program when the service is refused inside this block, whatever the library in between made of it.

    Says on stderr which checks failed, and exits as `vouchsafe` does: 1 refused, 2 for the user's own input. Every
    other exception passes."""
    try:
        yield
    except Exception as err:
        refusal = find(err)
        failure = refusal.failure if refusal is not None else _own(err)
        if failure is None:
            raise
        usage = isinstance(failure, InputError | PolicyError)
        sys.stderr.write(printable(_text(failure, refusal, "error" if usage else "REFUSED")))
        raise SystemExit(2 if usage else 1) from None


def _text(failure: VouchsafeError, refusal: NotAttested | None, word: str) -> str:
    lines = [f"{word}  {failure}"]
    if refusal is not None and refusal.result is not None and len(refusal.result.failed) > 1:
        for check in refusal.result.failed:
            lines.append(f"  fail  {check.code}: {short(check.reason, 120)}  [{check.id}]")
            if check.expected or check.actual:
                lines.append(f"        expected {short(check.expected, 80)}, got {short(check.actual, 80)}")
    hint = failure.hint or ("nothing of your request was sent" if refusal is not None else "")
    return "\n".join([*lines, *([f"  hint: {hint}"] if hint else []), ""])


def _own(error: BaseException | None) -> VouchsafeError | None:
    """The first error of ours among the causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, VouchsafeError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        example = {"VOUCHSAFE_TARGET": "https://NAME[:PORT]", "VOUCHSAFE_POLICY": "a policy file"}[name]
        raise InputError("INPUT_ENVIRONMENT", f"{name} is not set", expected=example, hint=f"export {name}=…")
    return value
