"""`vouchsafe verify`, `bundle`, `models`, `chat`: commands that meet a live service (verify: or a saved bundle)."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from attestation.bundle import MAX_BUNDLE, Bundle
from attestation.client.cli_common import (
    ACCEPTED,
    REFUSED,
    emit,
    moment,
    paint,
    policy_of,
    read_file,
    say,
    seconds,
    show,
    write_file,
)
from attestation.client.fetch import fetch_evidence
from attestation.client.report import printable, render, render_checks
from attestation.client.session import AttestedSession
from attestation.client.target import Target, parse_address
from attestation.errors import FormatError, InputError, RefusedError, TransportError
from attestation.ratls import Leaf
from attestation.verifier import verify

__all__ = ["bundle", "chat", "models", "verify_target"]

MAX_LINE: Final = 4 * 1024 * 1024


def verify_target(options: Namespace) -> int:
    """One verdict on a service, or on a saved bundle at its own time or at `--at`."""
    if options.yes and not options.first_use:
        raise InputError("INPUT_USAGE", "--yes answers the question of --first-use")
    if not options.target.startswith(("https://", "http://")):
        return _verify_saved(options)
    if options.at:
        raise InputError("INPUT_TIME", "a live service is verified now: --at is for a saved bundle")
    if options.first_use:
        from attestation.client.cli_first_use import explore

        return explore(options, _target(options))
    session = AttestedSession(
        _target(options), policy_of(options), explore=not options.policy, cache_dir=_cache(options)
    )
    return show(session.verify_once(), options, session.target.origin)


def _verify_saved(options: Namespace) -> int:
    if options.connect:
        raise InputError("INPUT_ADDRESS", "--connect is for a live service", actual=options.connect)
    if options.first_use:
        raise InputError("INPUT_USAGE", "--first-use is for a live service: a bundle can be verified again as it is")
    policy = policy_of(options)
    saved = Bundle.decode(read_file(options.target, "bundle", MAX_BUNDLE))
    name = None if options.name is None else options.name.lower()
    now, looked_back = own_time(saved, options.at), None
    if options.grace is not None:
        if not options.at:
            raise InputError(
                "INPUT_TIME", "--grace says how long after its own time a bundle may be used: give --at too"
            )
        looked_back = (now, seconds(options.grace))
        now = own_time(saved, None)
    result = verify(saved.evidence, saved.endorsements, policy, now=now, name=name, looked_back=looked_back)
    return show(result, options, options.target)


def own_time(saved: Bundle, at: str | None) -> int:
    """`--at`, else the bundle's own time: its certificate's not-before."""
    if at:
        return moment(at)
    try:
        return Leaf.parse(saved.evidence.leaf).not_before
    except FormatError:
        return 0  # the verifier refuses such a leaf at any time


def bundle(options: Namespace) -> int:
    """Save what one needs to verify later, offline. With `--policy` only after the service was accepted."""
    target = _target(options)
    if options.policy:
        session = AttestedSession(target, policy_of(options))
        result = session.verify_once()
        if not result.accepted:
            return show(result, options, target.origin)
        kept = session.bundle(bytes.fromhex(result.claims["leaf"]))
        assert kept is not None
        raw = kept.encode()
    else:
        raw = fetch_evidence(target)
        Bundle.decode(raw)
    write_file(options.output, raw, "bundle")
    if options.json:
        emit({"bundle": options.output, "bytes": len(raw), "verified": bool(options.policy)})
    else:
        state = "verified" if options.policy else "NOT verified yet"
        say(f"{options.output}: {len(raw)} bytes, {state}")
        say(f"  next: vouchsafe verify {options.output} --policy FILE")
    return ACCEPTED


def models(options: Namespace) -> int:
    """The models of a verified service."""
    from attestation.client.openai import attested_client  # httpx2 only where it is needed

    session = AttestedSession(_target(options), policy_of(options), cache_dir=_cache(options))
    with attested_client(session.target, policy=session.policy, session=session) as client:
        listed = _send(client, "GET", "/v1/models", options).json()
        ids = [str(m["id"]) for m in listed["data"]]
    if options.json:
        emit({"models": ids})
    else:
        for name in ids:
            say(printable(name))
    return ACCEPTED


def chat(options: Namespace) -> int:
    """Verdict first; then the answer, streamed; then what its receipt says."""
    from attestation.client.openai import attested_client

    session = AttestedSession(_target(options), policy_of(options), cache_dir=_cache(options))
    result = session.verify_once()
    if not result.accepted:
        return show(result, options, session.target.origin)
    if not options.json:
        if options.checks:
            say(render(result, subject=session.target.origin, paint=paint()))
        else:
            say(_brief(result.as_json(), session.target.origin))
    messages: list[dict[str, str]] = []
    with attested_client(session.target, policy=session.policy, session=session) as client:
        for prompt in [options.prompt] if options.prompt else _prompts():
            messages.append({"role": "user", "content": prompt})
            text = _ask(client, messages, options)
            messages.append({"role": "assistant", "content": text})
            verdict = client.receipts.verify_last()
            if options.save:
                _save(Path(options.save), client.receipts.last, session)
            receipt = client.receipts.last_receipt
            if options.json:
                emit({
                    "attestation": result.as_json(), "answer": text, "receipt": verdict.as_json(),
                    "receipt_id": receipt.receipt_id if receipt else None,
                })  # fmt: skip
            else:
                say()
                passed = sum(c.status == "pass" for c in verdict.checks)
                say(
                    paint()(
                        f"receipt {receipt.receipt_id if receipt else '-'}: {verdict.verdict}, {passed} checks", "dim"
                    )
                )
                if options.checks:
                    say("\n".join(render_checks(verdict.checks, paint())))
            if not verdict.accepted:
                return REFUSED
    return ACCEPTED


def _brief(result: dict[str, Any], origin: str) -> str:  # Any: JSON values
    passed = sum(c["status"] == "pass" for c in result["checks"])
    skipped = sum(c["status"] == "skip" for c in result["checks"])
    mark = "  DEVELOPMENT: nothing here rests on hardware" if result["development"] else ""
    return f"{paint()('ACCEPTED', 'pass')}  {origin}  ({passed} checks passed, {skipped} skipped){mark}"


def _prompts() -> Iterator[str]:
    """Lines that the user types, until an empty one or the end."""
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _ask(client: Any, messages: list[dict[str, str]], options: Namespace) -> str:  # Any: an AttestedClient
    """One completion; printed as it comes unless `--json`."""
    body = {"model": options.model, "messages": messages, "stream": True}
    if options.max_tokens:
        body["max_tokens"] = options.max_tokens
    pieces: list[str] = []
    with client.stream("POST", "/v1/chat/completions", json=body, headers=_credential(options)) as response:
        if response.status_code != 200:
            response.read()
            raise _api_error(response)
        for line in response.iter_lines():
            piece = _delta(line)
            pieces.append(piece)
            if piece and not options.json:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
    if not options.json:
        say()
    return "".join(pieces)


def _delta(line: str) -> str:
    """The text of one SSE line; "" for comments, `[DONE]` and events without text."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    try:
        event = json.loads(line[6:])
        if "error" in event:
            raise TransportError(
                "API_STREAM", "the service broke off the answer", actual=str(event["error"]["message"])
            )
        choices = event["choices"]
        return str(choices[0].get("delta", {}).get("content") or "") if choices else ""
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise FormatError("FORMAT_COMPLETION", "an event of the stream is not a completion chunk") from None


def _send(client: Any, method: str, path: str, options: Namespace) -> Any:  # Any: httpx2's client and response
    response = client.request(method, path, headers=_credential(options))
    if response.status_code != 200:
        raise _api_error(response)
    return response


def _api_error(response: Any) -> TransportError:  # Any: httpx2's response
    try:
        error = response.json()["error"]
        told, code = str(error["message"]), str(error["code"] or "")
    except (ValueError, KeyError, TypeError):
        told, code = "no reason given", ""
    hint = "is the key in --api-key-file the service's?" if response.status_code == 401 else ""
    return TransportError("API_STATUS", f"the service answered {response.status_code} {code}: {told}", hint=hint)


def _credential(options: Namespace) -> dict[str, str]:
    if not options.api_key_file:
        return {}
    key = read_file(options.api_key_file, "API key", 4096).decode("ascii", "replace").strip()
    if not key.isprintable() or not key or " " in key:
        raise InputError("INPUT_KEY", "the API key file does not hold one key on one line")
    return {"Authorization": f"Bearer {key}"}


def _save(folder: Path, exchange: Any, session: AttestedSession) -> None:  # Any: the recorder's Exchange
    """What `vouchsafe receipt verify` wants: receipt, request, response, bundle."""
    kept = session.bundle(exchange.leaf)
    if kept is None or exchange.receipt is None:
        raise RefusedError("RECEIPT_MISSING", "there is nothing to save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError("INPUT_FILE", f"cannot make the folder: {err.strerror or err}", actual=str(folder)) from err
    for name, raw in (
        ("receipt.json", exchange.receipt),
        ("request.json", exchange.request),
        ("response.txt", bytes(exchange.response)),
        ("evidence.bundle", kept.encode()),
    ):
        write_file(folder / name, raw, name)


def _target(options: Namespace) -> Target:
    return Target.parse(options.target, parse_address(options.connect) if options.connect else None)


def _cache(options: Namespace) -> Path | None:
    return Path(options.cache) if options.cache else None
