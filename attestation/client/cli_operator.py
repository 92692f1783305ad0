"""`vouchsafe deployment`, `status-list` (profile §3.8) and `exception`, each `new|sign|show`: what people sign.

`new` writes a payload that this project's reader accepts, `sign` wraps it in a DSSE envelope (Ed25519), `show` says
what an envelope holds and which keys signed it. Keys are PEM files (PKCS#8) of the operator; they are read, used and
forgotten. Runs on the operator's machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from argparse import Namespace
from typing import Any, Final, Literal, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from attestation.client.cli_common import ACCEPTED, REFUSED, emit, moment, read_file, say, seconds, write_file
from attestation.client.report import printable
from attestation.deployment import (
    DEPLOYMENT_PAYLOAD_TYPE,
    STATUS_PAYLOAD_TYPE,
    DeploymentStatement,
    StatusList,
    new_statement,
    new_status_list,
    salted,
)
from attestation.dsse import Envelope, public_bytes, sign
from attestation.errors import InputError
from attestation.exceptions import EXCEPTION_PAYLOAD_TYPE, TcbException, new_exception

__all__ = [
    "new_deployment",
    "new_status",
    "new_tcb_exception",
    "show_deployment",
    "show_exception",
    "show_status",
    "sign_deployment",
    "sign_exception",
    "sign_status",
]

MAX_DOCUMENT: Final = 256 * 1024


def new_deployment(options: Namespace) -> int:
    start = moment(options.not_before) if options.not_before else int(time.time())
    payload = new_statement(
        operator=options.operator,
        serial=options.serial,
        not_before=start,
        not_after=start + seconds(options.valid),
        dns_names=[n.lower() for n in options.dns_name],
        roles=options.role,
        configs=[_digest_of(c, "config") for c in options.config],
        releases=[_payload_digest_of(r, "release") for r in options.release],
        salt=_hex(options.salt, 32, "--salt") if options.salt else os.urandom(32),
        platforms=[_platform(p) for p in options.platform],
        gpus=[_hex(g, None, "--gpu") for g in options.gpu] if options.gpu else None,
    )
    return _written(payload, options)


def new_status(options: Namespace) -> int:
    start = moment(options.issued_at) if options.issued_at else int(time.time())
    salt = _hex(options.salt, 32, "--salt") if options.salt else b""
    if (options.platform or options.gpu) and not salt:
        raise InputError(
            "INPUT_USAGE", "platforms and GPUs are denied under a statement's salt", expected="--salt HEX",
            hint="`vouchsafe deployment show` prints it",
        )  # fmt: skip
    payload = new_status_list(
        serial=options.serial,
        issued_at=start,
        next_update=start + seconds(options.valid),
        releases=[_payload_digest_of(r, "release") for r in options.release or ()],
        configs=[_digest_of(c, "config") for c in options.config or ()],
        platforms=[salted(salt, _platform(p)[1]) for p in options.platform or ()],
        gpus=[salted(salt, _hex(g, None, "--gpu")) for g in options.gpu or ()],
        statements=[_payload_digest_of(s, "statement") for s in options.statement or ()],
        keys=[_hex(k, 32, "--key") for k in options.key or ()],
    )
    return _written(payload, options)


def new_tcb_exception(options: Namespace) -> int:
    start = moment(options.not_before) if options.not_before else int(time.time())
    payload = new_exception(
        status=options.status,
        advisories=options.advisory,
        fmspc=_hex(options.fmspc, 6, "--fmspc") if options.fmspc else None,
        reason=options.reason,
        not_before=start,
        not_after=start + seconds(options.valid),
    )
    return _written(payload, options)


def sign_exception(options: Namespace) -> int:
    payload = read_file(options.file, "exception", MAX_DOCUMENT)
    TcbException.parse(payload)
    return _signed(EXCEPTION_PAYLOAD_TYPE, payload, options)


def show_exception(options: Namespace) -> int:
    return _show(options, EXCEPTION_PAYLOAD_TYPE, TcbException.parse)


def sign_deployment(options: Namespace) -> int:
    payload = read_file(options.file, "statement", MAX_DOCUMENT)
    DeploymentStatement.parse(payload)
    return _signed(DEPLOYMENT_PAYLOAD_TYPE, payload, options)


def sign_status(options: Namespace) -> int:
    payload = read_file(options.file, "status list", MAX_DOCUMENT)
    StatusList.parse(payload)
    return _signed(STATUS_PAYLOAD_TYPE, payload, options)


def show_deployment(options: Namespace) -> int:
    return _show(options, DEPLOYMENT_PAYLOAD_TYPE, DeploymentStatement.parse)


def show_status(options: Namespace) -> int:
    return _show(options, STATUS_PAYLOAD_TYPE, StatusList.parse)


def _signed(payload_type: str, payload: bytes, options: Namespace) -> int:
    keys = [_private_key(path) for path in options.key]
    publics = [public_bytes(k).hex() for k in keys]
    if len(set(publics)) != len(publics):
        raise InputError("INPUT_KEY", "a key is given twice")
    write_file(options.output, sign(payload_type, payload, keys), "envelope")
    digest = hashlib.sha256(payload).hexdigest()
    if options.json:
        emit({"envelope": options.output, "payload_sha256": digest, "signers": publics})
    else:
        say(f"{options.output}: signed, payload sha256 {digest}")
        for public in publics:
            say(f"  signer {public}")
    return ACCEPTED


def _show(options: Namespace, payload_type: str, parse: Any) -> int:  # Any: either reader
    envelope = Envelope.parse(read_file(options.file, "envelope", MAX_DOCUMENT))
    keys = [_hex(k, 32, "--key") for k in options.key or ()]
    signers = sorted(k.hex() for k in envelope.signers(keys))
    right = envelope.payload_type == payload_type
    if right:
        parse(envelope.payload)
    accepted = right and len(signers) == len(set(keys))
    document = json.loads(envelope.payload) if right else None
    digest = hashlib.sha256(envelope.payload).hexdigest()
    if options.json:
        emit({
            "verdict": "accepted" if accepted else "refused", "payload_type": envelope.payload_type,
            "payload_sha256": digest, "signatures": len(envelope.signatures), "signers": signers, "payload": document,
        })  # fmt: skip
    else:
        say(f"type        {printable(envelope.payload_type)}" + ("" if right else f"  (want {payload_type})"))
        say(f"sha256      {digest}")
        say(f"signatures  {len(envelope.signatures)}" + ("" if keys else "  (not checked: give --key HEX)"))
        for key in keys:
            say(f"  {key.hex()}  {'signed' if key.hex() in signers else 'DID NOT SIGN'}")
        say(printable(json.dumps(document, indent=2)))
    return ACCEPTED if accepted else REFUSED


def _written(payload: bytes, options: Namespace) -> int:
    write_file(options.output, payload, "payload")
    digest = hashlib.sha256(payload).hexdigest()
    if options.json:
        emit({"payload": options.output, "payload_sha256": digest})
    else:
        say(f"{options.output}: {len(payload)} bytes, sha256 {digest}")
        say("  next: sign it with an operator's key")
    return ACCEPTED


def _private_key(path: str) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(read_file(path, "key", 64 * 1024), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            "INPUT_KEY", "not an Ed25519 private key (PEM, PKCS#8, not encrypted)", actual=path,
            hint="make one: openssl genpkey -algorithm ed25519 -out operator.pem",
        )  # fmt: skip
    return key


def _platform(text: str) -> tuple[Literal["piid", "ppid"], bytes]:
    kind, _, value = text.partition(":")
    if kind not in ("piid", "ppid"):
        raise InputError("INPUT_PLATFORM", "not a platform", expected="piid:HEX or ppid:HEX", actual=text)
    return cast(Literal["piid", "ppid"], kind), _hex(value, 16, "--platform")


def _digest_of(text: str, what: str) -> bytes:
    """SHA-256 in hex, or a file of which it is taken."""
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return bytes.fromhex(text)
    return hashlib.sha256(read_file(text, what, MAX_DOCUMENT)).digest()


def _payload_digest_of(text: str, what: str) -> bytes:
    """SHA-256 in hex, or a DSSE envelope of whose payload it is taken."""
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return bytes.fromhex(text)
    return hashlib.sha256(Envelope.parse(read_file(text, what, MAX_DOCUMENT)).payload).digest()


def _hex(text: str, size: int | None, what: str) -> bytes:
    wanted = "whole bytes in hex" if size is None else f"{size} bytes in hex"
    if not re.fullmatch(r"([0-9a-fA-F]{2})+", text) or (size is not None and len(text) != 2 * size):
        raise InputError("INPUT_HEX", f"{what} cannot be used", expected=wanted, actual=text)
    return bytes.fromhex(text)
