"""Deployment statements and status lists: strict payloads, short lives, salted identities."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from attestation.deployment import DeploymentStatement, StatusList, new_statement, new_status_list, salted
from attestation.errors import FormatError

NOW = 1_795_000_000
PIID, PPID, GPU = b"i" * 16, b"p" * 16, b"serial"
STATEMENT = new_statement(
    operator="Example", serial=7, not_before=NOW, not_after=NOW + 7 * 86400, dns_names=["b.test", "a.test"],
    roles=["model", "both"], configs=[b"c" * 32], releases=[b"r" * 32], salt=b"s" * 32,
    platforms=[("piid", PIID), ("ppid", PPID)], gpus=[GPU],
)  # fmt: skip
STATUS = new_status_list(serial=3, issued_at=NOW, next_update=NOW + 3600, releases=[b"r" * 32], keys=[b"k" * 32])


def changed(payload: bytes, key: str, value: Any) -> bytes:
    top = json.loads(payload)
    if value is ...:
        del top[key]
    else:
        top[key] = value
    return json.dumps(top).encode()


def test_a_statement_says_what_was_put_in_and_names_no_machine_plainly() -> None:
    s = DeploymentStatement.parse(STATEMENT)
    assert (s.operator, s.serial, s.dns_names, s.roles) == ("Example", 7, ("a.test", "b.test"), {"both", "model"})
    assert (s.configs, s.releases) == ({b"c" * 32}, {b"r" * 32})
    assert s.gpus == {hashlib.sha256(b"s" * 32 + GPU).digest()}
    assert PIID.hex().encode() not in STATEMENT
    assert PPID.hex().encode() not in STATEMENT


@pytest.mark.parametrize(
    ("piid", "ppid", "covered"),
    [
        (PIID, b"x" * 16, True), (None, PPID, True), (b"x" * 16, PPID, True), (None, b"x" * 16, False),
        (PPID, PIID, False), (b"x" * 16, b"y" * 16, False), (b"", b"", False),
    ],
)  # fmt: skip
def test_a_platform_is_covered_under_its_own_kind_of_id(piid: bytes | None, ppid: bytes, covered: bool) -> None:
    assert DeploymentStatement.parse(STATEMENT).covers_platform(piid, ppid) is covered


def test_another_salt_gives_another_name() -> None:
    assert salted(b"s" * 32, PIID) != salted(b"t" * 32, PIID)


HEX = "0a" * 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((k, ...) for k in json.loads(STATEMENT) if k != "gpus"), ("note", 1), ("version", 2), ("version", True),
        ("version", "1"), ("operator", None), ("operator", ""), ("operator", 1), ("serial", -1), ("serial", True),
        ("serial", "7"), ("notBefore", "2026"), ("notAfter", NOW), ("notAfter", NOW + 7 * 86400 + 1),
        ("notAfter", NOW - 1), ("dnsNames", []), ("dnsNames", ["*.test"]), ("dnsNames", ["A.test"]),
        ("dnsNames", "a.test"), ("roles", []), ("roles", ["admin"]), ("roles", "both"), ("roles", [["both"]]),
        ("configs", []), ("configs", [HEX[:-2]]), ("configs", [HEX.upper()]), ("configs", ["*"]), ("configs", [1]),
        ("configs", None), ("releases", []), ("releases", HEX), ("salt", ""), ("salt", HEX[:-2]), ("salt", None),
        ("platforms", [{"type": "any", "salted": HEX}]), ("platforms", [{"type": "piid"}]), ("platforms", ["*"]),
        ("platforms", [{"type": "piid", "salted": "00"}]), ("platforms", {}), ("platforms", [{}]),
        ("platforms", [{"type": "piid", "salted": HEX, "note": 1}]), ("gpus", []), ("gpus", None), ("gpus", ["*"]),
        ("platforms", [{"type": "piid", "salted": HEX}] * 1025), ("platforms", [{"type": [], "salted": HEX}]),
    ],
)  # fmt: skip
def test_a_statement_with_another_value_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        DeploymentStatement.parse(changed(STATEMENT, key, value))
    assert caught.value.code == "FORMAT_DEPLOYMENT"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((k, ...) for k in json.loads(STATUS)), ("note", []), ("version", 2), ("version", True), ("serial", -1),
        ("issuedAt", None), ("nextUpdate", NOW), ("nextUpdate", NOW + 3601), ("nextUpdate", 2**53),
        *((k, v) for k in ("releases", "configs", "platforms", "gpus", "statements", "keys")
          for v in (None, {}, HEX, [1], [HEX[:-2]], [HEX.upper()], ["*"], [HEX] * 1025)),
    ],
)  # fmt: skip
def test_a_status_list_with_another_value_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        StatusList.parse(changed(STATUS, key, value))
    assert caught.value.code == "FORMAT_STATUS"


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 99_999, b'{"version": 1.0}', b" " * 200_000]
)
@pytest.mark.parametrize(
    ("parser", "code"),
    [(DeploymentStatement.parse, "FORMAT_DEPLOYMENT"), (StatusList.parse, "FORMAT_STATUS")],
)
def test_what_is_no_document_is_refused(parser: Any, code: str, raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parser(raw)
    assert caught.value.code == code


def test_an_unusable_document_is_never_written() -> None:
    with pytest.raises(FormatError):
        new_status_list(serial=1, issued_at=NOW, next_update=NOW + 86400)
    with pytest.raises(FormatError):
        new_statement(
            operator="x", serial=1, not_before=NOW, not_after=NOW + 1, dns_names=["a.test"], roles=["both"],
            configs=[], releases=[b"r" * 32], salt=b"s" * 32, platforms=[],
        )  # fmt: skip
