"""docs/verification.md lists every check and code there is, and nothing that is not there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from attestation.result import AttestationResult, Checks, Status
from attestation.tdx import appraise_event_log, parse_event_log
from attestation.tdx.signature import _STAGES
from attestation.verifier import verify_gpu
from tests.attestation.test_verifier_channel import LIES as CHANNEL_LIES
from tests.genuine import any_reason, genuine
from tests.lies import LIES

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.compile(r"^\| `([a-z0-9.-]+)` \| ([^|]*) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
CODE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
OURS = re.compile(
    r"(?:EXCEPTION|FORMAT|TDX|GPU|LEAF|CLAIMS|EVIDENCE|RELEASE|DEPLOYMENT|STATUS|STATEMENT|KEYSET|CHANNEL|VERIFIER|RESULT)_(?!.*(?:PAYLOAD_TYPE|PATH|MEDIA)$)"
)
"""How our codes begin. Names of constants in `__all__` and `__slots__` look alike, and end otherwise."""
NOT_OURS = {"ear.py", "receipt.py", "sse.py", "policy.py", "policy_table.py", "errors.py", "roots.py"}


def page() -> str:
    return (ROOT / "docs" / "verification.md").read_text()


def rows() -> dict[str, set[str]]:
    found = ROWS.findall(page())
    assert len({r[0] for r in found}) == len(found), "an id stands twice"
    return {r[0]: set(CODE.findall(r[1])) for r in found}


def sources() -> list[Path]:
    folders = (ROOT / "attestation", ROOT / "attestation" / "tdx", ROOT / "attestation" / "gpu")
    return [p for f in folders for p in sorted(f.glob("*.py")) if p.name not in NOT_OURS]


def strings(tree: ast.AST) -> set[str]:
    """Plain strings of a module; docstrings and the halves of f-strings are not looked at."""
    skipped = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    skipped |= {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in skipped]
    return {n.value for n in constants if isinstance(n.value, str)}


@cache
def words() -> frozenset[str]:
    return frozenset(w for p in sources() for w in strings(ast.parse(p.read_text())))


@cache
def results() -> tuple[AttestationResult, ...]:
    found = [genuine(**changes).verify() for changes, _ in LIES.values()]
    honest = genuine(policy={"channel.fresh-gpu": True})
    found += [honest.verify_channel(honest.channel(gpu=True)), honest.verify_channel(honest.channel())]
    plain = genuine()
    found += [plain.verify_channel(lie(plain)) for lie, _ in CHANNEL_LIES.values()]
    skips = {"gpu": any_reason(), "release": any_reason(), "deployment": any_reason()}
    bare = genuine(policy=skips, name=None, statement={"gpus": None})
    from attestation.gpu import GpuEndorsements, GpuEvidence

    nothing = verify_gpu(GpuEvidence(()), GpuEndorsements({}, {}), bare.policy, nonce=bytes(32), now=0)
    return (*found, bare.verify(), nothing)


def listed(id: str) -> str:
    """The row that speaks of *id*: a check repeated for a connection stands under its own id."""
    return re.sub(r"^channel\.(?=tdx\.|gpu\.)", "", id)


def test_every_check_that_happens_is_on_the_page_with_its_code() -> None:
    known = rows()
    seen = {(listed(c.id), c.code) for r in results() for c in r.checks if c.status is Status.FAIL}
    assert {listed(c.id) for r in results() for c in r.checks} - known.keys() == set()
    assert {(id, code) for id, code in seen if code not in known[id]} == set()
    assert len(seen) > 70


def test_every_code_in_the_sources_is_on_the_page() -> None:
    named = set(CODE.findall(page()))
    there = {w for w in words() if CODE.fullmatch(w) and OURS.match(w)}
    there -= {"FORMAT_GPU", "GPU_CHAIN", "GPU_RIM_CHAIN"}  # beginnings of codes
    there |= {stage.code for stage in _STAGES}
    assert there - named == set()
    assert len(there) > 100


def test_every_id_in_the_sources_is_on_the_page() -> None:
    """Ids that are written out: `checks.require("leaf.form", …)` and tables of them."""
    form = re.compile(r"(?:leaf|claims|tdx|gpu|release|deployment|status|keyset|channel|verifier|result)\.[a-z0-9.-]+")
    there = {listed(w) for w in words() if form.fullmatch(w)} | {stage.id for stage in _STAGES}
    there -= {"tdx.rtmr"}  # a member of release manifests
    assert there - rows().keys() == set()
    assert len(there) > 60


def test_nothing_stands_on_the_page_that_is_not_in_the_code() -> None:
    happens = {listed(c.id) for r in results() for c in r.checks}
    known = happens | words() | {stage.id for stage in _STAGES} | {f"tdx.events-rtmr{i}" for i in range(3)}
    assert rows().keys() - known == set()
    built = {f"TDX_{w}" for w in words()} | {f"GPU_{n}" for n in ("DRIVER", "VBIOS", "HWMODEL")}
    built |= {f"{p}_{e}" for p in ("GPU_CHAIN", "GPU_RIM_CHAIN") for e in ("LENGTH", "ISSUER", "CA", "VALIDITY")}
    built |= {stage.code for stage in _STAGES} | {c.code for r in results() for c in r.checks}
    built |= {f"TDX_RTMR{i}" for i in range(3)} | {"TDX_MRTD"}
    codes = {c for found in rows().values() for c in found}
    assert codes - built - words() == set()


def test_the_event_by_event_comparison_is_the_row_it_says() -> None:
    honest = genuine()
    log, checks = parse_event_log(honest.evidence.event_log), Checks()
    appraise_event_log(log, honest.tee.td.rtmr, checks, items=[], reference={0: [], 1: [], 2: []})
    found = {c.id: c.code for c in checks if c.id.startswith("tdx.events-")}
    assert found == {f"tdx.events-rtmr{i}": "TDX_EVENT" for i in range(3)}
    assert all("TDX_EVENT" in rows()[id] for id in found)


def test_every_row_says_a_clause_and_a_threat() -> None:
    for id, _, clause, threat in ROWS.findall(page()):
        assert len(clause.strip()) > 5, id
        assert len(threat.strip()) >= 7, id


@pytest.mark.parametrize("row", ["leaf.form", "tdx.report-data", "channel.report-data", "gpu.nonce"])
def test_a_row_taken_out_is_noticed(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(line for line in page().splitlines() if not line.startswith(f"| `{row}`"))
    monkeypatch.setattr("tests.attestation.test_verification_page.page", lambda: text, raising=False)
    monkeypatch.setitem(globals(), "page", lambda: text)
    with pytest.raises(AssertionError):
        test_every_check_that_happens_is_on_the_page_with_its_code()
    with pytest.raises(AssertionError):
        test_every_id_in_the_sources_is_on_the_page()
