"""The whole boot, in a process of its own on the development TEE, with the echo engine: what comes up, what refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attestation.binding import EXPORTER_SIZE
from attestation.bundle import Bundle
from attestation.channel import CHANNEL_PATH, EVIDENCE_PATH, ChannelProof, channel_request
from attestation.policy import Policy
from attestation.verifier import verify, verify_channel
from enclave.boot import STAGES
from enclave.engine.processes import alive, descendants
from tests.demo.provision import Provisioned, provision
from tests.demo.tenant import Tenant
from tests.devtee.running import running_machine
from tests.enclave.machine import EnclaveProcess, model_directory
from tests.enclave.support import NAME, Client, wait_until


def make(folder: Path, state: Path, **options: Any) -> Provisioned:
    return provision(
        folder / "made", state, model_directory(folder / "model"), None, "parrot",
        f"unix:{folder / 's' / 'e.sock'}", NAME, **options,
    )  # fmt: skip


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short name: socket paths have 107 bytes."""
    folder = tmp_path_factory.mktemp("b")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A machine for boots that fail before RTMR3 is touched."""
    folder = tmp_path_factory.mktemp("m") / "tee"
    with running_machine(folder):
        yield folder


def test_enclave_boots_in_numbered_stages_and_a_client_accepts_it(short: Path) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee", "child") as enclave:
            enclave.wait_for("enclave: listening on unix:")
            lines = [line for line in enclave.console if line.startswith("boot ") and ": ok" in line]
            assert [line.split(": ok")[0] for line in lines] == [
                f"boot {n}/12 {name}" for n, name in enumerate(STAGES, 1)
            ]
            socket_path = short / "s" / "e.sock"
            assert ready(socket_path) == (503, {"status": "not-ready", "models": {"parrot": "ready"}, "state": "new"})
            tenant = enclave.set_up(made, socket_path)
            _client_accepts(socket_path, made, tenant)
            pids = descendants(enclave.process.pid)
            assert pids, "the test's child is there"
            assert enclave.stop() == 0
        assert not alive(pids), "a child was left"
        assert not socket_path.exists()
        for secret in (made.secret, tenant.api_key, tenant.admin_key, tenant.state_key):
            assert secret not in enclave.text

        # The same machine again: RTMR3 already holds the first boot.
        with EnclaveProcess(made.config, short / "tee") as second:
            assert second.wait() == 1
            assert "boot 7/12 rtmr3: FAILED: BOOT_RTMR3" in second.text and "hint: an enclave boots once" in second.text


def _client_accepts(path: Path, made: Provisioned, tenant: Tenant) -> None:
    """Steps (1) to (7) of the verifier over the wire, under the client's policy, and an answer with a receipt."""
    policy, now = Policy.parse(made.policy.read_text()), int(time.time())
    with Client(path) as client:
        status, raw = client.get(EVIDENCE_PATH)
        assert status == 200
        bundle = Bundle.decode(raw)
        assert bundle.evidence.leaf == client.leaf
        assert len(client.leaf) <= 13_056, "does not fit the first flight"
        first = verify(bundle.evidence, bundle.endorsements, policy, now=now, name=NAME)
        assert first.accepted, first.failed
        assert first.development
        nonce = os.urandom(32)
        for fresh_gpu in (False, True):
            body = channel_request(nonce, gpu=fresh_gpu, binding="exporter")
            status, answer = client.get(CHANNEL_PATH, method="POST", body=body)
            assert status == 200, answer
            proof = ChannelProof.from_answer(answer, nonce=nonce, exporter=client.exporter(nonce))
            assert (proof.gpu is not None) is fresh_gpu
            result = verify_channel(first, bundle.evidence, bundle.endorsements, policy, proof, now=now, group="")
            assert result.accepted, result.failed
        # The same proof on another connection binds nothing.
        with Client(path) as other:
            stolen = ChannelProof.from_answer(answer, nonce=nonce, exporter=other.exporter(nonce))
            refused = verify_channel(first, bundle.evidence, bundle.endorsements, policy, stolen, now=now, group="")
            assert refused.codes == ("CHANNEL_REPORT_DATA",)
        assert len(client.exporter(nonce)) == EXPORTER_SIZE
        assert client.get("/health/ready") == (200, b'{"status":"ready","models":{"parrot":"ready"}}')
        status, text = client.get("/metrics")
        assert status == 200 and b'vouchsafe_engine_up{gen_ai_request_model="parrot"} 1.0' in text
        assert b"vouchsafe_state_open 1.0" in text
        question = {"model": "parrot", "messages": [{"role": "user", "content": "say it"}]}
        headers = f"authorization: Bearer {tenant.api_key}\r\ncontent-type: application/json\r\n"
        status, text = client.get(
            "/v1/chat/completions", method="POST", body=json.dumps(question).encode(), headers=headers
        )
        assert status == 200 and b"say it" in text and b"x-receipt-id" in client.header


def _edit(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "stage", "code", "status"),
    [
        ("unknown-key", 1, "INPUT_CONFIG_FIELD: gpu.color: is not a key", 2),
        ("no-model", 1, "INPUT_CONFIG_FIELD: models[0].path: there is no directory", 2),
        ("policy-changed", 1, "INPUT_APPRAISAL", 2),
        ("no-release", 1, "INPUT_STATEMENTS", 2),
        ("gpu-disagrees", 1, "INPUT_APPRAISAL", 2),
        ("injected", 2, "INPUT_ENVIRONMENT: the environment sets LD_PRELOAD", 2),
        ("gpu-count", 3, "BOOT_GPU_STATE", 1),
        ("no-driver", 3, "ATTESTER_", 1),
        ("weights", 4, "BOOT_WEIGHTS", 1),
        ("no-endorsements", 6, "", 1),
    ],
)
def test_a_stage_that_fails_stops_the_boot_and_says_what_to_do(
    short: Path, state: Path, change: str, stage: int, code: str, status: int
) -> None:
    made = make(short, state)
    env: dict[str, str] = {}
    match change:
        case "unknown-key":
            _edit(made.config, "switches = 0", "switches = 0\ncolor = 1")
        case "no-model":
            shutil.rmtree(short / "model")
        case "policy-changed":
            made.appraisal.write_text(made.appraisal.read_text() + "# looser\n")
        case "no-release":
            (made.statements / "release.json").unlink()
        case "gpu-disagrees":
            _edit(made.config, "count = 1", "count = 0")
        case "injected":
            env = {"LD_PRELOAD": ""}
        case "gpu-count":
            _edit(made.config, "count = 1", "count = 2")
        case "no-driver":
            env = {"LD_LIBRARY_PATH": "/nonexistent"}
        case "weights":
            (short / "model" / "extra").write_text("x")
        case "no-endorsements":
            (short / "empty").mkdir()
            _edit(made.config, f'endorsements = "{state / "endorsements"}"', f'endorsements = "{short / "empty"}"')
    with EnclaveProcess(made.config, state, env=env) as enclave:
        assert enclave.wait() == status, enclave.text
        failed = [line for line in enclave.console if "FAILED" in line]
        assert len(failed) == 1 and failed[0].startswith(f"boot {stage}/12 {STAGES[stage - 1]}: FAILED: {code}")
        assert enclave.console[-1] == "enclave: stopped"
        assert any(line.startswith("hint: ") for line in enclave.console)
        assert "Traceback" not in enclave.text
    assert not (short / "s" / "e.sock").exists()


def test_developer_tools_on_the_gpu_stop_the_boot_before_its_ready_state(short: Path) -> None:
    with running_machine(short / "tee", "--set", "gpu.dev_tools=1"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee") as enclave:
            assert enclave.wait() == 1
            assert "boot 3/12 gpu probe: FAILED" in enclave.text


def test_a_gpu_on_the_bus_that_the_driver_does_not_list_stops_the_boot(short: Path) -> None:
    with running_machine(short / "tee", "--set", "gpu.unlisted=1"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee") as enclave:
            assert enclave.wait() == 1
            assert "boot 3/12 gpu probe: FAILED: ATTESTER_GPU_PCI" in enclave.text


def test_a_false_gpu_measurement_is_refused_before_the_gpu_may_work(short: Path) -> None:
    with running_machine(short / "tee", "--set", "gpu.form.driver=535.0"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee") as enclave:
            assert enclave.wait() == 1
            assert "boot 6/12 gpu evidence: FAILED" in enclave.text


def test_own_verifier_refuses_a_configuration_the_operator_did_not_sign(short: Path) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee")
        made.write_deployment(configs=[bytes(32)])
        with EnclaveProcess(made.config, short / "tee") as enclave:
            assert enclave.wait() == 1
            assert "boot 9/12 certificate: FAILED: DEPLOYMENT_CONFIG" in enclave.text


def test_a_live_enclave_keeps_its_socket_and_a_dead_ones_is_replaced(short: Path, state: Path) -> None:
    made = make(short, state)
    (short / "s").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(short / "s" / "e.sock"))
        other.listen()
        with EnclaveProcess(made.config, state) as enclave:
            assert enclave.wait() == 2
            assert "INPUT_LISTEN_BUSY" in enclave.text and "hint: stop the other server" in enclave.text
        assert (short / "s" / "e.sock").exists()
    (short / "model" / "extra").write_text("x")  # so that the boot ends at stage 4
    with EnclaveProcess(made.config, state) as enclave:
        assert enclave.wait() == 1
        assert "boot 1/12 configuration: ok" in enclave.text


@pytest.mark.parametrize("wishes", [("start-delay=60", "child"), ("start-fails", "child")])
def test_a_boot_that_ends_at_the_engine_leaves_nothing_running(short: Path, wishes: tuple[str, ...]) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee", *wishes) as enclave:
            enclave.wait_for("engine: starting")
            pids: dict[int, str] = {}
            while not pids:
                pids = descendants(enclave.process.pid)
                if enclave.process.poll() is not None:
                    break
            if "start-fails" in wishes:
                assert enclave.wait() == 1
                assert "boot 10/12 engine: FAILED: ENGINE_START: model parrot: no such luck" in enclave.text
            else:
                assert enclave.stop() == 0
                assert "asked to stop during the boot" in enclave.text
            assert not alive(pids)


def test_a_dead_engine_ends_the_whole_process_fail_closed(short: Path) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee")
        with EnclaveProcess(made.config, short / "tee", "die-after=0.5") as enclave:
            enclave.wait_for("enclave: listening")
            assert enclave.wait() == 3
            assert "engine parrot failed" in enclave.text
        assert not (short / "s" / "e.sock").exists()


# --- several models ---------------------------------------------------------------------------------------------------


def worker(enclave: EnclaveProcess, model: str) -> int:
    """pid of the process that serves *model*."""
    for pid in descendants(enclave.process.pid):
        if f"--id={model}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process serves {model}")


def asked(path: Path, tenant: Tenant, model: str) -> tuple[int, str, str]:
    """Status, model named in the answer or code of the error, and the head."""
    headers = f"authorization: Bearer {tenant.api_key}\r\ncontent-type: application/json\r\n"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "say it"}]}).encode()
    with Client(path) as client:
        status, text = client.get("/v1/chat/completions", method="POST", body=body, headers=headers)
        document = json.loads(text)
        return status, document["model"] if status == 200 else document["error"]["code"], client.header.decode()


def ready(path: Path) -> tuple[int, dict[str, Any]]:
    with Client(path) as client:
        status, text = client.get("/health/ready")
        return status, json.loads(text)


def test_a_process_that_dies_takes_its_own_model_down_and_comes_back(short: Path) -> None:
    models = {"parrot": "ready", "second": "ready", "third": "ready"}
    up = {"status": "ready", "models": models}
    path = short / "s" / "e.sock"
    with running_machine(short / "tee"):
        made = make(short, short / "tee", more=("second", "third"))
        with EnclaveProcess(made.config, short / "tee") as enclave:
            tenant = enclave.set_up(made, path)
            assert "engine: starting second (profile cpu, process)" in enclave.text
            assert "engine: ok" in enclave.text and "3 started" in enclave.text
            assert ready(path) == (200, up)
            for model in models:
                assert asked(path, tenant, model)[:2] == (200, model)

            wishes = made.directory / "run" / "engine-1" / "wishes.json"
            wishes.write_text('{"refuse": true}')  # so that it stays away while we look
            os.kill(worker(enclave, "second"), signal.SIGKILL)
            enclave.wait_for('"event":"engine.restart","model":"second"')
            status, code, head = asked(path, tenant, "second")
            assert (status, code) == (503, "engine_unavailable")
            assert "retry-after:" in head.lower() and "x-should-retry" not in head.lower()
            assert ready(path) == (200, {**up, "models": {**models, "second": "unavailable"}})
            for model in ("parrot", "third"):
                assert asked(path, tenant, model)[:2] == (200, model)

            wishes.write_text("{}")
            wait_until(lambda: ready(path) == (200, up), 60)
            assert asked(path, tenant, "second")[:2] == (200, "second")
            pids = descendants(enclave.process.pid)
            assert enclave.stop() == 0
            assert not alive(pids), "a worker was left"


def test_a_process_that_does_not_start_stops_the_boot_and_is_named(short: Path) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee", more=("second",))
        with EnclaveProcess(made.config, short / "tee", "process-fails") as enclave:
            assert enclave.wait() == 1
            assert "boot 10/12 engine: FAILED: ENGINE_MEMORY: model second: no such luck" in enclave.text
            assert "hint: free some" in enclave.text


def test_enclave_killed_outright_leaves_no_worker(short: Path) -> None:
    with running_machine(short / "tee"):
        made = make(short, short / "tee", more=("second",))
        with EnclaveProcess(made.config, short / "tee") as enclave:
            enclave.wait_for("enclave: listening on unix:")
            pids = descendants(enclave.process.pid)
            assert worker(enclave, "second") in pids
            enclave.process.kill()
            enclave.wait()
            wait_until(lambda: not alive(pids), 10)
