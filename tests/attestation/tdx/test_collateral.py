"""Collateral has one form; what differs from it is refused before anything is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import FormatError
from attestation.tdx import Collateral
from attestation.tdx.collateral import KEYS, MAX_COLLATERAL
from tests.attestation.tdx.dev import NOW, tee
from tests.devtee.tdx import CollateralSpec


def honest() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(tee().collateral(NOW))
    return value


def test_one_spelling_comes_out_whatever_order_came_in() -> None:
    shuffled = json.dumps(dict(reversed(honest().items())), indent=2).encode()
    collateral = Collateral.parse(shuffled)
    assert list(json.loads(collateral.to_json())) == list(KEYS)
    assert Collateral.parse(collateral.to_json()) == collateral
    assert Collateral.parse(collateral.to_json()).to_json() == collateral.to_json()


def test_chain_for_the_pck_is_dropped() -> None:
    given_chain = tee().collateral(NOW, CollateralSpec(pck_chain=True))
    assert b"pck_certificate_chain" in given_chain
    assert b"pck_certificate_chain" not in Collateral.parse(given_chain).to_json()


def changed(key: str, value: object) -> Callable[[dict[str, Any]], bytes]:
    return lambda c: json.dumps(c | {key: value}).encode()


def without(key: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda c: json.dumps({k: v for k, v in c.items() if k != key}).encode()


def inner(key: str, change: dict[str, object]) -> Callable[[dict[str, Any]], bytes]:
    return lambda c: json.dumps(c | {key: json.dumps(json.loads(c[key]) | change)}).encode()


REFUSED = [
    ("empty", lambda c: b""),
    ("not UTF-8", lambda c: b"\xff" + json.dumps(c).encode()),
    ("a list", lambda c: b"[]"),
    ("nested without end", lambda c: b"[" * 100_000),
    ("too long", lambda c: b" " * MAX_COLLATERAL + json.dumps(c).encode()),
    ("a key twice", lambda c: json.dumps(c).encode()[:-1] + b',"pck_crl":"00"}'),
    ("a key nobody knows", changed("extra", "")),
    *((f"without {key}", without(key)) for key in KEYS),
    *((f"{key} no text", changed(key, 1)) for key in KEYS),
    ("hex in upper case", lambda c: changed("root_ca_crl", c["root_ca_crl"].upper())(c)),
    ("hex with a space", lambda c: changed("pck_crl", c["pck_crl"][:2] + " " + c["pck_crl"][2:])(c)),
    ("half a byte", lambda c: changed("pck_crl", c["pck_crl"] + "0")(c)),
    ("no CRL", changed("pck_crl", "")),
    ("short signature", lambda c: changed("tcb_info_signature", c["tcb_info_signature"][:-2])(c)),
    ("chain that is no PEM", changed("tcb_info_issuer_chain", "hello")),
    ("text before the chain", lambda c: changed("tcb_info_issuer_chain", "x" + c["tcb_info_issuer_chain"])(c)),
    ("empty chain", changed("qe_identity_issuer_chain", "")),
    ("chain of nine", lambda c: changed("pck_crl_issuer_chain", c["pck_crl_issuer_chain"] * 5)(c)),
    ("half a surrogate pair", changed("tcb_info", "\ud800")),
    ("text that is not ASCII", lambda c: changed("qe_identity", c["qe_identity"].replace("TD_QE", "TD_QÉ"))(c)),
    ("TCB info no JSON", changed("tcb_info", "{")),
    ("TCB info a list", changed("tcb_info", "[]")),
    ("no evaluation number", inner("tcb_info", {"tcbEvaluationDataNumber": None})),
    ("evaluation number true", inner("tcb_info", {"tcbEvaluationDataNumber": True})),
    ("evaluation number negative", inner("qe_identity", {"tcbEvaluationDataNumber": -1})),
    ("FMSPC too short", inner("tcb_info", {"fmspc": "00"})),
    ("date without zone", inner("tcb_info", {"issueDate": "2026-10-08T00:09:46"})),
    ("no such date", inner("tcb_info", {"nextUpdate": "2026-02-30T00:00:00Z"})),
    ("tcbType text", inner("tcb_info", {"tcbType": "0"})),
]


@pytest.mark.parametrize("make", [r[1] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_any_other_form_is_refused(make: Callable[[dict[str, Any]], bytes]) -> None:
    with pytest.raises(FormatError) as caught:
        Collateral.parse(make(honest()))
    assert caught.value.code.startswith("FORMAT_TDX_COLLATERAL")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_random_bytes_never_crash_the_parser(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Collateral.parse(raw)
