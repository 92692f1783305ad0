"""Results: only the verifier makes one, a skip is no pass, and a refusal carries no facts."""

from __future__ import annotations

import ast
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from attestation import result as module
from attestation.errors import FormatError
from attestation.result import AttestationResult, Check, Checks, Status, TrustAnchor
from tests.genuine import genuine

ROOT = Path(__file__).resolve().parents[2]
GUARDED = {"conclude", "_SEAL", "AttestationResult"}


def conclude(checks: Checks, **changes: Any) -> AttestationResult:
    given: dict[str, Any] = {
        "claims": {"a": 1}, "not_proven": (), "anchors": [TrustAnchor("root", bytes(32), True)],
        "policy": ("p", ""), "now": 1, "valid_until": 9, "development": False,
    }  # fmt: skip
    return module.conclude(checks, **(given | changes))


def book(*statuses: str) -> Checks:
    checks = Checks()
    for status in statuses:
        checks.add(Check(f"t.{status}", Status(status), status.upper(), "asked"))
    return checks


def shipped() -> list[Path]:
    return [
        p for zone in ("attestation", "enclave", "host", "measurements") for p in sorted((ROOT / zone).rglob("*.py"))
    ]


def uses(tree: ast.AST) -> set[str]:
    """Names of `GUARDED` that a module calls, imports or reaches as an attribute; annotations do not count."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            found |= {name} & {"conclude", "AttestationResult"}
        if isinstance(node, ast.ImportFrom):
            found |= {a.name for a in node.names} & {"conclude", "_SEAL"}
        if isinstance(node, ast.Attribute | ast.Name):
            word = node.attr if isinstance(node, ast.Attribute) else node.id
            found |= {word} & {"conclude", "_SEAL"}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & {"_SEAL", "conclude"}  # getattr and friends
    return found


def test_only_the_verifier_makes_a_result() -> None:
    made = {p.relative_to(ROOT).as_posix(): uses(ast.parse(p.read_text())) for p in shipped()}
    assert {p: u for p, u in made.items() if u and p != "attestation/result.py"} == {
        "attestation/verifier.py": {"conclude"}
    }
    assert len(made) > 40


@pytest.mark.parametrize(
    "text",
    [
        "from attestation.result import conclude as c", "from attestation import result\nresult.conclude(x)",
        "import attestation.result as r\nr._SEAL", "from attestation.result import _SEAL",
        "AttestationResult(1, 2)", "r.AttestationResult()", "getattr(r, '_SEAL')",
    ],
)  # fmt: skip
def test_the_scan_sees_every_way_to_make_one(text: str) -> None:
    assert uses(ast.parse(text))


def test_the_scan_lets_annotations_pass() -> None:
    assert not uses(
        ast.parse("from attestation.result import AttestationResult\ndef f(r: AttestationResult) -> None: ...")
    )


def test_a_result_cannot_be_made_or_turned_by_hand() -> None:
    refused = conclude(book("fail"))
    fields = {f.name: getattr(refused, f.name) for f in dataclasses.fields(refused)}
    with pytest.raises(TypeError):
        AttestationResult(**fields, _seal=object())
    with pytest.raises(TypeError):
        AttestationResult(**fields)
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(refused, verdict="accepted")
    with pytest.raises(dataclasses.FrozenInstanceError):
        refused.verdict = "accepted"  # type: ignore[misc]  # the point
    assert not [n for n in dir(refused) if "seal" in n.lower() and hasattr(refused, n)]
    assert copy.copy(refused).verdict == "refused"


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["pass"], "accepted"), (["pass", "skip"], "accepted"), (["pass", "fail"], "refused"), (["fail"], "refused"),
        (["skip"], "refused"), ([], "refused"), (["pass", "skip", "fail", "pass"], "refused"),
    ],
)  # fmt: skip
def test_one_failure_refuses_and_a_skip_is_no_pass(statuses: list[str], verdict: str) -> None:
    result = conclude(book(*statuses))
    assert (result.verdict, result.accepted) == (verdict, verdict == "accepted")
    assert bool(result.codes) is (verdict == "refused")


def test_a_refused_result_carries_no_claims_and_no_life() -> None:
    result = conclude(book("pass", "fail"))
    assert (dict(result.claims), result.valid_until) == ({}, 0)
    assert dict(conclude(book("pass")).claims) == {"a": 1}


def test_a_root_of_ones_own_or_a_policy_marked_so_is_development() -> None:
    own = TrustAnchor("root", bytes(32), False)
    assert not conclude(book("pass")).development
    assert conclude(book("pass"), anchors=[own]).development
    assert conclude(book("pass"), development=True).development
    assert conclude(book("fail"), anchors=[own]).development


def test_only_true_passes() -> None:
    for ok in (1, "yes", object(), None, False):
        checks = Checks()
        assert not checks.require("t", ok, code="C", reason="r")  # type: ignore[arg-type]  # the point
        assert checks.failed


@pytest.mark.parametrize(
    ("expected", "actual"), [(1, True), (0, False), (b"a", bytearray(b"a")), ((1,), [1]), (1, 1.0), ("", None)]
)
def test_values_of_two_types_are_never_equal(expected: object, actual: object) -> None:
    checks = Checks()
    assert not checks.equal("t", expected, actual, code="C", reason="r")


def test_a_parser_that_refuses_is_a_failed_check_with_its_own_code() -> None:
    def parser() -> int:
        raise FormatError("FORMAT_X", "why", expected=1, actual=2)

    checks = Checks()
    assert checks.parse("t", parser, reason="r") is None
    assert [(c.code, c.reason, c.expected, c.actual) for c in checks.failed] == [("FORMAT_X", "why", "1", "2")]


def test_hostile_text_reaches_no_terminal_as_it_is() -> None:
    """`actual` quotes evidence: a line of its own, or a colour, must not forge the verdict."""

    def parser() -> int:
        raise FormatError("FORMAT_X", "why\x1b[2J", expected="\u202eabc", actual="x\nverdict: accepted\r\x9b")

    checks = Checks()
    checks.parse("t", parser, reason="r")
    checks.require("t", False, code="C", reason="fine é", actual="\x00")
    assert all(text.isprintable() for c in checks for text in (c.reason, c.expected, c.actual))
    assert checks.failed[0].actual == r"x\nverdict: accepted\r\x9b"
    assert checks.failed[1].reason == "fine é"


def test_the_json_form_says_everything() -> None:
    told = genuine(name="other.test").verify().as_json()
    assert (told["verdict"], told["development"], told["codes"], told["claims"]) == ("refused", True, ["LEAF_NAME"], {})
    assert {"id", "status", "code", "reason", "expected", "actual", "cite"} == set(told["checks"][0])
    assert all(c["reason"] for c in told["checks"])
