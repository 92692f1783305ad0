"""The running machine behaves like hardware to a small client and to the real nvidia-ml-py."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import dcap_qvl  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.devtee.eventlog import boot_events, replay
from tests.devtee.nvml import MAGIC, REPLY, REQUEST
from tests.devtee.running import REPOSITORY, running_machine
from tests.devtee.tee import DevTee

DEADLINE: Final = 5.0


class TsmClient:
    """configfs-tsm as an attester uses it, in a dozen lines."""

    def __init__(self, state: Path) -> None:
        self.entry = state / "tsm" / secrets.token_hex(8)
        self.entry.mkdir()
        wait(lambda: (self.entry / "inblob").exists(), "the attributes appear")

    def generation(self) -> int:
        return int((self.entry / "generation").read_text())

    def quote(self, data: bytes) -> bytes:
        with (self.entry / "inblob").open("r+b", buffering=0) as handle:
            handle.write(data)
        return (self.entry / "outblob").read_bytes()


def wait(condition: Any, what: str) -> None:  # Any: a callable without arguments
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE} s until {what}"
        time.sleep(0.002)


def register(state: Path, index: int) -> Path:
    return state / "measurements" / f"rtmr{index}:sha384"


def extend(state: Path, index: int, digest: bytes) -> bytes:
    with register(state, index).open("r+b", buffering=0) as handle:
        handle.write(digest)
    wait(lambda: register(state, index).read_bytes() != digest, "the register is extended")
    return register(state, index).read_bytes()


def nvml(state: Path, script: str) -> Any:  # Any: the JSON that the script prints
    """Run *script* with the real nvidia-ml-py on the stand-in; `n` is pynvml, `out` is printed as JSON."""
    head = "import json, ctypes, pynvml as n\nn.nvmlInit()\n"
    text = f"{head}{script}\nn.nvmlShutdown()\nprint(json.dumps(out))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(state / "lib")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("machine") / "state"
    with running_machine(folder, "--gpus", "2"):
        yield folder


def verified(state: Path, quote: bytes) -> dcap_qvl.VerifiedReport:
    collateral = dcap_qvl.QuoteCollateralV3.from_json((state / "endorsements" / "collateral.json").read_text())
    root = (state / "roots" / "intel.der").read_bytes()
    return dcap_qvl.verify_with_root_ca(quote, collateral, root, int(time.time()))


def test_quote_read_from_outblob_verifies_under_the_root_in_the_folder(state: Path) -> None:
    client = TsmClient(state)
    data = secrets.token_bytes(64)
    quote = client.quote(data)
    assert verified(state, quote).status == "UpToDate" and quote[568:632] == data
    assert (client.entry / "provider").read_text() == "tdx_guest\n"
    assert (client.entry / "auxblob").read_bytes() == b""


def test_each_write_is_one_generation_and_the_same_bytes_again_are_another_quote(state: Path) -> None:
    client = TsmClient(state)
    data = secrets.token_bytes(64)
    before = client.generation()
    quotes = {client.quote(data) for _ in range(8)}
    assert client.generation() == before + 8
    assert len(quotes) == 8  # ECDSA is randomised: each was made anew


def test_many_clients_each_get_their_own_quote(state: Path) -> None:
    clients = [TsmClient(state) for _ in range(4)]
    for client in clients:
        data = secrets.token_bytes(64)
        assert client.quote(data)[568:632] == data


def test_report_data_of_another_length_gets_no_quote(state: Path) -> None:
    assert TsmClient(state).quote(bytes(63)) == b""


def test_removed_entry_is_forgotten_and_the_machine_goes_on(state: Path) -> None:
    client = TsmClient(state)
    for file in list(client.entry.iterdir()):
        file.unlink()
    client.entry.rmdir()
    assert len(TsmClient(state).quote(bytes(64))) > 4000


def test_writing_a_digest_extends_the_register_and_the_next_quote_shows_it(state: Path) -> None:
    for _ in range(5):
        before, digest = register(state, 3).read_bytes(), secrets.token_bytes(48)
        after = extend(state, 3, digest)
        assert after == hashlib.sha384(before + digest).digest()
    quote = TsmClient(state).quote(bytes(64))
    assert quote[48 + 472 : 48 + 520] == after
    assert verified(state, quote).status == "UpToDate"


def test_digest_that_equals_the_register_extends_it_too(state: Path) -> None:
    before = register(state, 3).read_bytes()
    assert extend(state, 3, before) == hashlib.sha384(before + before).digest()


def test_write_of_another_length_extends_nothing(state: Path) -> None:
    before = register(state, 3).read_bytes()
    for short in (b"\xff", secrets.token_bytes(47 - 8)):
        with register(state, 3).open("r+b", buffering=0) as handle:
            handle.write(short)
        wait(lambda: register(state, 3).stat().st_mtime_ns == 1_000_000_000, "the write is noticed")
        assert register(state, 3).read_bytes() == before
    with register(state, 3).open("r+b", buffering=0) as handle:
        handle.write(secrets.token_bytes(49))
    wait(lambda: len(register(state, 3).read_bytes()) == 48, "the write is noticed")
    assert register(state, 3).read_bytes() == before


def test_event_log_replays_to_the_registers_and_the_quote(state: Path) -> None:
    table = (state / "acpi" / "CCEL").read_bytes()
    log = (state / "acpi" / "data" / "CCEL").read_bytes()
    assert len(table) == 56 and table[:4] == b"CCEL" and table[36] == 2 and sum(table) % 256 == 0
    assert int.from_bytes(table[40:48], "little") == len(log) and log.endswith(b"\xff" * 1024)
    expected = replay(boot_events())
    assert [register(state, i).read_bytes() for i in range(3)] == list(expected[:3])
    assert TsmClient(state).quote(bytes(64))[48 + 328 : 48 + 472] == b"".join(expected[:3])


@pytest.mark.parametrize(("changed", "registers"), [
    ({"cmdline": "x"}, {2}), ({"kernel": "x"}, {1, 2}), ({"initrd": "x"}, {1, 2}),
])  # fmt: skip
def test_another_boot_changes_the_registers_it_would_change(changed: dict[str, str], registers: set[int]) -> None:
    honest, other = replay(boot_events()), replay(boot_events(**changed))
    assert {i for i in range(4) if honest[i] != other[i]} == registers


def test_real_nvidia_ml_py_collects_reports_and_chains_of_both_gpus(state: Path) -> None:
    out = nvml(
        state,
        """
def device(i):
    h = n.nvmlDeviceGetHandleByIndex(i)
    r = n.nvmlDeviceGetConfComputeGpuAttestationReport(h, bytes(range(32)))
    c = n.nvmlDeviceGetConfComputeGpuCertificate(h)
    p = n.nvmlDeviceGetPciInfo(h)
    m = n.nvmlDeviceGetConfComputeMemSizeInfo(h)
    return {"uuid": n.nvmlDeviceGetUUID(h), "name": n.nvmlDeviceGetName(h), "vbios": n.nvmlDeviceGetVbiosVersion(h),
            "arch": n.nvmlDeviceGetArchitecture(h), "bus": p.busId.decode() if isinstance(p.busId, bytes) else p.busId,
            "report": bytes(r.attestationReport[:r.attestationReportSize]).hex(),
            "cec": r.isCecAttestationReportPresent,
            "chain": bytes(c.attestationCertChain[:c.attestationCertChainSize]).decode(), "mem": m.protectedMemSizeKib}
out = {"driver": n.nvmlSystemGetDriverVersion(), "devices": [device(i) for i in range(n.nvmlDeviceGetCount())]}
""",
    )
    tee = DevTee.load(state)
    assert out["driver"] == "550.90.07"
    first, second = out["devices"]
    assert first["uuid"] != second["uuid"] and first["bus"] != second["bus"]
    for index, device in enumerate((first, second)):
        assert device["chain"].encode() == tee.pki.device_chain(index)
        report = bytes.fromhex(device["report"])
        assert len(report) == 4117 and report[4:36] == bytes(range(32))
        assert (device["vbios"], device["arch"], device["cec"]) == ("96.00.9F.00.01", 9, 0)
        assert device["name"].startswith("SIM ") and device["mem"] == 80 << 20


def test_system_state_is_production_with_confidential_computing_on_and_ready_can_be_set(state: Path) -> None:
    out = nvml(
        state,
        """
s, c = n.nvmlSystemGetConfComputeState(), n.nvmlSystemGetConfComputeCapabilities()
t = n.c_nvmlSystemConfComputeSettings_v1_t()
assert n.nvmlSystemGetConfComputeSettings(ctypes.byref(t)) == 0
before = n.nvmlSystemGetConfComputeGpusReadyState()
n.nvmlSystemSetConfComputeGpusReadyState(1)
after = n.nvmlSystemGetConfComputeGpusReadyState()
n.nvmlSystemSetConfComputeGpusReadyState(0)
bad = []
for call in (lambda: n.nvmlDeviceGetHandleByIndex(2), lambda: n.nvmlSystemSetConfComputeGpusReadyState(7)):
    try:
        call()
    except n.NVMLError as err:
        bad.append(err.value)
out = [[s.environment, s.ccFeature, s.devToolsMode], [t.environment, t.ccFeature, t.devToolsMode, t.multiGpuMode],
       c.cpuCaps, before, after, bad]
""",
    )
    assert out == [[2, 1, 0], [2, 1, 0, 0], 2, 0, 1, [2, 2]]


def test_clients_that_say_nothing_or_nonsense_do_not_stop_the_driver(state: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as noisy:
        silent.connect(str(state / "nvml.sock"))
        noisy.connect(str(state / "nvml.sock"))
        noisy.sendall(b"x" * 48)
        noisy.settimeout(DEADLINE)
        assert REPLY.unpack(noisy.recv(64)) == (MAGIC, 2, 0)
        assert nvml(state, "out = n.nvmlDeviceGetCount()") == 2


def test_device_that_is_not_in_the_machine_has_no_report(state: Path) -> None:
    for index, status in ((1, 0), (2, 2), (2**32 - 1, 2)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(state / "nvml.sock"))
            client.sendall(REQUEST.pack(MAGIC, 13, index, 0, bytes(32)))
            assert REPLY.unpack(client.recv(12))[:2] == (MAGIC, status)


def test_endorsements_and_roots_lie_in_the_folder(state: Path) -> None:
    tee = DevTee.load(state)
    folder = state / "endorsements"
    assert {p.name for p in (folder / "rims").iterdir()} == {f"{i}.xml" for i in tee.rims()}
    assert {p.name for p in (folder / "ocsp").iterdir()} == {f"{i}.der" for i in tee.ocsp(0, gpus=2)}
    for name in ("intel", "nvidia_device", "nvidia_rim"):
        assert (state / "roots" / f"{name}.der").read_bytes() == getattr(tee.roots, name)
        assert (state / "roots" / f"{name}.pem").read_bytes() == tee.roots_pem[name]


def test_second_machine_in_the_same_folder_is_refused(state: Path) -> None:
    with pytest.raises(RuntimeError, match="status 1"), running_machine(state):
        pass
    assert len(TsmClient(state).quote(bytes(64))) > 4000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_cleanly_lets_readers_go_and_boots_again_with_the_same_pki(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "state"
    with running_machine(folder) as process:
        client = TsmClient(folder)
        extend(folder, 3, b"\1" * 48)
        reader = subprocess.Popen(["cat", str(client.entry / "outblob")], stdout=subprocess.DEVNULL)
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
        assert reader.wait(DEADLINE) == 0
    root = (folder / "roots" / "intel.der").read_bytes()
    assert not (folder / "nvml.sock").exists() and not (folder / "tsm").exists()
    with running_machine(folder):
        assert (folder / "roots" / "intel.der").read_bytes() == root
        assert register(folder, 3).read_bytes() == bytes(48)


def test_lies_are_told_from_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    lies = (
        "quote.padding=70", "quote.version=5", "quote.body=1.5", "td.td_attributes=0x10000001",
        f"td.mrconfigid={'11' * 48}", "collateral.evaluation=3", "collateral.revoked=intel-pck", "gpu.dev_tools=1",
        "gpu.duplicate=true", "gpu.multi_gpu=1", "gpu.form.driver=535.0", "ocsp.revoked=device-ik-0",
    )  # fmt: skip
    with running_machine(folder, "--gpus", "2", *(part for lie in lies for part in ("--set", lie))):
        quote = TsmClient(folder).quote(bytes(64))
        assert quote[:2] == b"\5\0" and quote.endswith(bytes(71))
        assert quote[54 + 120 : 54 + 128] == (0x10000001).to_bytes(8, "little")
        assert quote[54 + 184 : 54 + 232] == b"\x11" * 48
        assert (folder / "measurements" / "mrconfigid").read_bytes() == b"\x11" * 48
        collateral = json.loads((folder / "endorsements" / "collateral.json").read_text())
        assert json.loads(collateral["tcb_info"])["tcbEvaluationDataNumber"] == 3
        out = nvml(
            folder,
            """
a, b = (n.nvmlDeviceGetConfComputeGpuCertificate(n.nvmlDeviceGetHandleByIndex(i)) for i in range(2))
out = [bytes(a.attestationCertChain) == bytes(b.attestationCertChain), n.nvmlSystemGetDriverVersion(),
       n.nvmlSystemGetConfComputeState().devToolsMode]
""",
        )
        assert out == [True, "535.0", 1]


@pytest.mark.parametrize("arguments", [
    ["--gpus", "9"], ["--set", "nonsense"], ["--set", "td.nothing=1"], ["--set", "gpu.duplicate=perhaps"],
])  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tests.devtee", "--state", str(tmp_path / "s"), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
