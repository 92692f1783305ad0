"""The commands that meet a live service: the real boot of the enclave (echo engine) on the development TEE.

One enclave for the whole file. What leaves before a verdict is counted in `test_session.py`; here the commands speak.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from attestation.bundle import Bundle
from attestation.client.cli import main
from attestation.client.openai import attested_client
from attestation.client.session import read_policy
from attestation.ratls import Leaf
from tests.attestation.client.ratls_server import Server, plain_certificate
from tests.demo.provision import Provisioned, provision
from tests.demo.tenant import Tenant
from tests.devtee.running import running_machine
from tests.enclave.machine import EnclaveProcess, model_directory
from tests.enclave.support import NAME


@dataclass
class Live:
    """A running service, and the options with which a client meets it."""

    made: Provisioned
    port: int
    folder: Path
    tenant: Tenant

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.port}"

    @property
    def seen(self) -> list[str]:
        return ["--policy", str(self.made.policy), "--connect", f"127.0.0.1:{self.port}"]

    @property
    def key(self) -> list[str]:
        path = self.folder / "key"
        path.write_text(self.tenant.api_key + "\n")
        return ["--api-key-file", str(path)]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("c")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running_machine(folder / "tee"):
        made = provision(
            folder / "made", folder / "tee", model_directory(folder / "model"), None, "parrot",
            f"tcp:127.0.0.1:{port}", NAME,
        )  # fmt: skip
        with EnclaveProcess(made.config, folder / "tee") as enclave:
            yield Live(made, port, folder, enclave.set_up(made, port))
    shutil.rmtree(folder, ignore_errors=True)


def test_verify_says_the_verdict_first_then_every_check(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", live.url, *live.seen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ACCEPTED  {live.url}") and "DEVELOPMENT" in lines[0]
    text = "\n".join(lines)
    for word in ("pass  channel.report-data", "pass  gpu.", "operator", "not proven", "physical attacks", "parrot"):
        assert word in text


def test_verify_json_names_the_exporter_binding(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", live.url, *live.seen, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "accepted" and result["development"] is True
    assert result["claims"]["channel"]["binding"] == "exporter" and result["claims"]["gpu"]["devices"]


def test_verify_without_a_policy_refuses_what_intel_did_not_sign(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in policy knows Intel's root alone: a development machine is none of its."""
    assert main(["verify", live.url, "--connect", f"127.0.0.1:{live.port}", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "refused" and result["development"] is False and result["codes"]


def test_chat_shows_the_verdict_then_the_answer_then_the_receipt(
    live: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask = ["chat", "--target", live.url, *live.seen, *live.key, "--model", "parrot", "--save", str(tmp_path / "kept")]
    assert main([*ask, "What can the host see?"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("ACCEPTED") and "What can the host see?" in lines[1]
    assert lines[-1].startswith("receipt ") and ": accepted, " in lines[-1]

    kept = tmp_path / "kept"
    files = ["--bundle", str(kept / "evidence.bundle"), "--request", str(kept / "request.json")]
    check = ["receipt", "verify", str(kept / "receipt.json"), "--policy", str(live.made.policy), *files]
    assert main([*check, "--response", str(kept / "response.txt")]) == 0
    assert capsys.readouterr().out.startswith("ACCEPTED  receipt ")

    edited = json.loads((kept / "receipt.json").read_bytes())
    edited["served_at"] += 1
    (kept / "edited.json").write_text(json.dumps(edited))
    check[2] = str(kept / "edited.json")
    assert main([*check, "--json"]) == 1
    assert "RECEIPT_SIGNATURE" in json.loads(capsys.readouterr().out)["codes"]

    check[2] = str(kept / "receipt.json")
    (kept / "response.txt").write_bytes((kept / "response.txt").read_bytes().replace(b"host", b"HOST"))
    assert main([*check, "--response", str(kept / "response.txt")]) == 1
    assert "RECEIPT_RESPONSE_HASH" in capsys.readouterr().out


def test_chat_takes_lines_until_the_end_of_input(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("first question\nsecond question\n"))
    assert main(["chat", "--target", live.url, *live.seen, *live.key, "--model", "parrot"]) == 0
    assert capsys.readouterr().out.count(": accepted, ") == 2


def test_chat_json(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--target", live.url, *live.seen, *live.key, "--model", "parrot", "--json", "Hello?"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["attestation"]["verdict"] == told["receipt"]["verdict"] == "accepted" and "Hello?" in told["answer"]


def test_models_are_listed(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--target", live.url, *live.seen, *live.key]) == 0
    assert capsys.readouterr().out == "parrot\n"


@pytest.mark.parametrize(("key", "model", "told"), [("wrong", "parrot", "401"), (None, "nobody", "404")])
def test_error_of_the_service_is_told_in_its_own_words(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str | None, model: str, told: str
) -> None:
    (tmp_path / "key").write_text(key or live.tenant.api_key)
    ask = ["chat", "--target", live.url, *live.seen, "--api-key-file", str(tmp_path / "key"), "--model", model, "Hi"]
    assert main(ask) == 1
    error = capsys.readouterr().err
    assert "API_STATUS" in error and told in error and "hint:" in error and (key or "sk-") not in error


def test_bundle_saved_now_verifies_offline_later(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept.bundle"
    assert main(["bundle", live.url, "-o", str(path), *live.seen]) == 0
    policy = ["--policy", str(live.made.policy)]
    assert main(["verify", str(path), *policy]) == 0
    assert main(["verify", str(path), *policy, "--name", NAME]) == 0
    capsys.readouterr()
    for wrong in ("other.test", ""):  # an unset shell variable is no reason to skip the name
        assert main(["verify", str(path), *policy, "--name", wrong]) == 1
        assert "LEAF_NAME" in capsys.readouterr().out
    assert main(["verify", str(path), *policy, "--at", "2040-01-01T00:00:00Z"]) == 1
    assert "LEAF_EXPIRED" in capsys.readouterr().out
    later = str(Leaf.parse(Bundle.decode(path.read_bytes()).evidence.leaf).not_before + 20 * 86400)
    assert main(["verify", str(path), *policy, "--at", later]) == 1
    assert main(["verify", str(path), *policy, "--at", later, "--grace", "30d"]) == 0
    assert "bundle.age" in capsys.readouterr().out
    assert main(["verify", str(path), *policy, "--at", later, "--grace", "7d"]) == 1
    assert "BUNDLE_AGE" in capsys.readouterr().out
    assert main(["verify", str(path), *policy, "--at", "1000000000", "--grace", "30d"]) == 1
    assert main(["verify", str(path), *policy, "--grace", "30d"]) == 2
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert main(["verify", str(path), *policy, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["codes"] == ["FORMAT_BUNDLE"]


def test_policy_that_pins_another_operator_refuses_and_names_it(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = live.made.policy.read_text()
    from attestation.dsse import public_bytes

    other = public_bytes(Ed25519PrivateKey.generate()).hex()
    changed = text.replace(public_bytes(live.made.operator).hex(), other)
    assert changed != text
    (tmp_path / "policy.toml").write_text(changed)
    seen = ["--policy", str(tmp_path / "policy.toml"), "--connect", f"127.0.0.1:{live.port}"]
    assert main(["verify", live.url, *seen]) == 1
    out = capsys.readouterr().out
    assert out.startswith("REFUSED") and "DEPLOYMENT_OPERATOR" in out.split("checks:")[0]
    assert main(["chat", "--target", live.url, *seen, *live.key, "--model", "parrot", "secret"]) == 1
    assert "DEPLOYMENT_OPERATOR" in capsys.readouterr().out


def test_relay_that_swaps_the_certificate_is_refused_by_every_command(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    from attestation.client.fetch import fetch_evidence
    from attestation.client.target import Target
    from tests.attestation.client.enclave import FETCH
    from tests.attestation.client.ratls_server import answer

    genuine = fetch_evidence(Target(NAME, live.port, ("127.0.0.1", live.port)))
    with Server(*plain_certificate(NAME)) as relay:
        relay.routes[FETCH] = answer(genuine)
        seen = ["--policy", str(live.made.policy), "--connect", f"127.0.0.1:{relay.port}"]
        assert main(["verify", live.url, *seen]) == 1
        assert "FORMAT_LEAF" in capsys.readouterr().out
        assert main(["chat", "--target", live.url, *seen, *live.key, "--model", "parrot", "the user's own prompt"]) == 1
        assert "FORMAT_LEAF" in capsys.readouterr().out
        assert set(relay.requests) == {FETCH} and b"own prompt" not in relay.received


def test_openai_sdk_talks_to_the_real_enclave(live: Live) -> None:
    policy = read_policy(live.made.policy)
    with attested_client(live.url, policy=policy, connect=("127.0.0.1", live.port)) as http:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.tenant.api_key, http_client=http, max_retries=0)
        for _ in range(3):
            chunks = client.chat.completions.create(
                model="parrot", messages=[{"role": "user", "content": "Hello?"}], stream=True
            )
            assert "Hello?" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert http.receipts.verify_last().accepted
        assert http.session.last_result is not None and http.session.last_result.accepted
        done = client.completions.create(model="parrot", prompt="Hello?")
        assert done.choices[0].text and http.receipts.verify_last().accepted


# --- the operator's statements ---


def pem(folder: Path) -> tuple[str, str]:
    from attestation.dsse import public_bytes

    key = Ed25519PrivateKey.generate()
    path = folder / "operator.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(path), public_bytes(key).hex()


def test_operator_writes_signs_and_shows_a_deployment_statement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, public = pem(tmp_path)
    config = tmp_path / "enclave.toml"
    config.write_text("version = 1\n")
    new = [
        "deployment", "new", "--operator", "Example", "--serial", "1", "--dns-name", NAME, "--role", "both",
        "--config", str(config), "--release", "00" * 32, "--platform", "piid:" + "11" * 16,
    ]  # fmt: skip
    payload, envelope = str(tmp_path / "payload.json"), str(tmp_path / "deployment.json")
    assert main([*new, "-o", payload]) == 0
    assert main(["deployment", "sign", payload, "--key", key, "-o", envelope]) == 0
    capsys.readouterr()
    assert main(["deployment", "show", envelope, "--key", public, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["signers"] == [public] and shown["payload"]["operator"] == "Example"
    assert main(["deployment", "show", envelope, "--key", "22" * 32]) == 1
    assert "DID NOT SIGN" in capsys.readouterr().out
    assert main([*new, "--valid", "8d", "-o", payload]) != 0
    assert main(["status-list", "show", envelope]) == 1


def test_operator_writes_signs_and_shows_a_status_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, public = pem(tmp_path)
    payload, envelope = str(tmp_path / "payload.json"), str(tmp_path / "status.json")
    new = ["status-list", "new", "--serial", "7", "--platform", "piid:" + "11" * 16]
    assert main([*new, "-o", payload]) == 2
    assert "--salt" in capsys.readouterr().err
    assert main([*new, "--salt", "33" * 32, "--key", "44" * 32, "-o", payload]) == 0
    assert main(["status-list", "sign", payload, "--key", key, "-o", envelope]) == 0
    assert main(["status-list", "show", envelope, "--key", public]) == 0
    assert main(["deployment", "sign", payload, "--key", key, "-o", envelope]) == 1


def test_command_runs_as_a_module_and_ends_quietly_when_its_reader_has_gone(live: Live) -> None:
    command = [sys.executable, "-m", "attestation.client.cli", "verify", live.url, *live.seen]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert b"Traceback" not in error
