"""Implementations that could not be installed as a package, or need a real machine: they run where they are named.

README.md in this folder says how each is built and what to set. Unset, these tests skip and say so.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.service import NONCE, Recorded
from tests.interop.test_ratls_peer import other, serving

ACI: Final = "VOUCHSAFE_ACI_VERIFIER"
RATS_TLS: Final = "VOUCHSAFE_RATS_TLS_CLIENT"
TARGET: Final = "VOUCHSAFE_TDX_TARGET"
PROGRAM: Final = Path(__file__).with_name("aci_elsewhere.mjs")
COMPARED: Final = ("plain", "stream", "unknown model", "no key")
"""Not `inline`: a receipt in the body it speaks of is an extension of ours, on request only."""


def named(variable: str, what: str) -> str:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{what}: {variable} is not set, see tests/interop/README.md")
    return value


def ask(folder: str, question: dict[str, Any]) -> Any:  # Any: JSON values
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", PROGRAM.read_text()],
        input=json.dumps(question).encode(), capture_output=True, timeout=60, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


def question(shown: Recorded, nonce: str = NONCE) -> dict[str, Any]:
    receipts = [
        {
            "receipt": json.loads(exchange.receipt),
            "request": base64.b64encode(exchange.request).decode(),
            "response": base64.b64encode(exchange.response).decode(),
        }
        for exchange in (shown.exchanges[name] for name in COMPARED)
    ]
    return {"report": json.loads(shown.reports[NONCE]), "nonce": nonce, "receipts": receipts}


@pytest.fixture
def aci_verifier() -> str:
    folder = named(ACI, "the draft's own TypeScript verifier of aci/1 could not be installed from npm")
    if shutil.which("node") is None:
        pytest.skip("the draft's own verifier of aci/1 needs Node.js 20")
    return folder


def test_the_drafts_own_verifier_accepts_report_and_receipts(tdx: Recorded, aci_verifier: str) -> None:
    assert ask(aci_verifier, question(tdx)) == {"report": True, "receipts": [[True, True, True]] * len(COMPARED)}


def test_the_drafts_own_verifier_sees_what_was_changed(tdx: Recorded, aci_verifier: str) -> None:
    asked = question(tdx)
    asked["receipts"][0]["receipt"]["served_at"] += 1
    asked["receipts"][1]["request"] = base64.b64encode(b"{}").decode()
    asked["receipts"][2]["response"] = base64.b64encode(b"{}").decode()
    assert ask(aci_verifier, asked)["receipts"] == [
        [False, True, True], [True, False, True], [True, True, False], [True, True, True],
    ]  # fmt: skip
    assert ask(aci_verifier, question(tdx, nonce="f" * 64))["report"] is False


def test_rats_tls_accepts_a_real_machine_and_no_certificate_without_evidence() -> None:
    """rats-tls asks for Intel's root, so the development TEE cannot do: *TARGET* is `address:port` of a TDX guest."""
    client = named(RATS_TLS, "rats-tls is built from source")
    address, _, port = named(TARGET, "rats-tls verifies real TDX quotes only").rpartition(":")

    def status(address: str, port: int | str) -> int:
        command = [client, "--ip", address, "--port", str(port), "--attester", "nullattester"]
        return subprocess.run(
            [*command, "--verifier", "tdx_ecdsa", "--crypto", "openssl", "--tls", "openssl"], timeout=120
        ).returncode

    assert status(address, port) == 0
    with serving(other(None)) as local:
        assert status("127.0.0.1", local) != 0
