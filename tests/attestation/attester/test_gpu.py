"""The production GPU attester on the real nvidia-ml-py, over the development TEE's stand-in for the driver.

A program that uses the stand-in is started with its folder on the loader's path, so the attester runs in a process of
its own here. What no driver of the development TEE does (impossible sizes, reports over another nonce, devices
out of order) is played by an object with pynvml's functions (`driver.py`).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]  # ships no types
import pytest

from attestation.attester import AttesterError
from attestation.attester.gpu import GpuAttester
from attestation.gpu import GpuEndorsements, appraise, decode
from attestation.policy import platform_policy
from attestation.result import Checks
from tests.attestation.attester.driver import Driver, attester
from tests.devtee.running import REPOSITORY, running_machine
from tests.devtee.tee import DevTee

NONCE = bytes(range(32))


def run(state: Path, script: str) -> Any:  # Any: the JSON that the script prints
    """`script` in a process whose NVML is the machine of *state*; `gpu` is an attester, `out` is what it returns.

    An `AttesterError` comes back as its code, reason and hint; any other exception fails the test."""
    head = (
        "import base64, json\n"
        "from attestation.attester import AttesterError\n"
        "from attestation.attester.gpu import GpuAttester\n"
        "from attestation.gpu import encode\n"
        f"NONCE = bytes.fromhex('{NONCE.hex()}')\n"
        "from pathlib import Path\n"
        f"try:\n    gpu = GpuAttester(pci=Path({str(state / 'pci')!r}))\n"
    )
    body = "".join(f"    {line}\n" for line in script.splitlines())
    tail = (
        "    gpu.close()\n    gpu.close()\n"
        "except AttesterError as err:\n    out = [err.code, err.reason, err.hint]\n"
        "print(json.dumps(out))"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(state / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", head + body + tail], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


STATE = (
    "s = gpu.state()\n"
    "out = [s.count, s.switches, s.mode, s.cc, s.dev_tools, s.ready, s.production]"
)  # fmt: skip
COLLECT = "out = base64.b64encode(encode(gpu.collect(NONCE))).decode()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder whose PKI all machines of this file share: making keys is what costs."""
    state = tmp_path_factory.mktemp("machine") / "state"
    DevTee.create(state, gpus=3)
    return state


def test_evidence_of_all_gpus_is_what_a_client_accepts(folder: Path) -> None:
    with running_machine(folder, "--gpus", "3"):
        carried = base64.b64decode(run(folder, COLLECT))
        end = folder / "endorsements"
        rims = {p.stem: p.read_bytes() for p in (end / "rims").glob("*.xml")}
        ocsp = {p.stem: p.read_bytes() for p in (end / "ocsp").glob("*.der")}
        now = int((end / "collateral.json").stat().st_mtime)
    tee = DevTee.load(folder)
    evidence, checks = decode(carried), Checks()
    facts = appraise(
        evidence, GpuEndorsements(rims, ocsp), nonce=NONCE, now=now, checks=checks,
        policy=platform_policy(gpu_count=3, gpu_switches=0, gpu_mode="spt").gpu,  # type: ignore[arg-type]  # no Skip
        device_root=tee.roots.nvidia_device, rim_root=tee.roots.nvidia_rim,
    )  # fmt: skip
    assert checks.failed == []
    assert facts is not None
    serials = [tee.pki[f"device-ik-{i}"].cert.serial_number for i in range(3)]
    assert [int(d.ik_serial, 16) for d in facts.devices] == serials, "PCI order"


def test_state_is_the_drivers_word_and_ready_is_set_and_seen(folder: Path) -> None:
    with running_machine(folder, "--gpus", "2"):
        out = run(
            folder,
            "a = gpu.state().ready\ngpu.set_ready(True)\nb = gpu.state().ready\n"
            "gpu.set_ready(False)\nc = gpu.state().ready\n" + STATE + "\nout = [a, b, c, *out]",
        )
    assert out == [False, True, False, 2, 0, "spt", True, False, False, True]


def test_state_hides_nothing_the_driver_says(folder: Path) -> None:
    lies = ("gpu.dev_tools=1", "gpu.cc_feature=0", "gpu.environment=1", "gpu.multi_gpu=2")
    with running_machine(folder, *(word for lie in lies for word in ("--set", lie))):
        assert run(folder, STATE) == [1, 0, "mpt", False, True, False, False]


def test_protected_pcie_is_refused_by_name(folder: Path) -> None:
    with running_machine(folder, "--set", "gpu.multi_gpu=1"):
        for script in (COLLECT, STATE):
            code, reason, hint = run(folder, script)
            assert code == "ATTESTER_GPU_PPCIE"
            assert "protected PCIe" in reason and "single-GPU passthrough" in hint


def test_ready_state_that_cannot_be_set_is_an_error_that_says_why(folder: Path) -> None:
    with running_machine(folder, "--set", "gpu.ready_locked=true"):
        code, reason, hint = run(folder, "gpu.set_ready(True)\nout = 'set'")
    assert code == "ATTESTER_NVML" and "Insufficient Permissions" in reason
    assert "root" in hint and "reboot" in hint


def test_driver_that_is_not_there_is_an_error_with_a_hint(folder: Path) -> None:
    with running_machine(folder):
        pass
    code, reason, hint = run(folder, "out = 'open'")
    assert code == "ATTESTER_NVML" and "Driver Not Loaded" in reason and "nvidia-smi" in hint


def test_driver_that_dies_is_an_error_and_no_empty_evidence(folder: Path) -> None:
    with running_machine(folder) as machine:
        script = f"import os, signal, time\nos.kill({machine.pid}, signal.SIGKILL)\ntime.sleep(0.3)\n" + COLLECT
        assert run(folder, script)[0] == "ATTESTER_NVML"


def test_missing_package_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(AttesterError) as refused:
        GpuAttester()
    assert refused.value.code == "ATTESTER_NVML_MISSING" and "vouchsafe[enclave]" in refused.value.hint


def test_devices_come_in_pci_order_whatever_order_the_driver_lists(folder: Path) -> None:
    tee = DevTee.load(folder)
    evidence = attester(Driver(tee, (0x30, 0x10, 0x20)), folder).collect(NONCE)
    leaves = [tee.pki[f"device-ak-{i}"].der for i in (1, 2, 0)]
    assert [d.chain[0] for d in evidence.devices] == leaves
    assert all(len(d.chain) == 4 and tee.roots.nvidia_device not in d.chain for d in evidence.devices)


@pytest.mark.parametrize(
    ("name", "value", "field", "seen"),
    [
        ("devToolsMode", 2, "dev_tools", True),
        ("ccFeature", 0, "cc", False),
        ("ccFeature", 2, "cc", False),
        ("environment", 0, "production", False),
        ("environment", 3, "production", False),
    ],
)
def test_word_of_the_driver_that_is_not_plainly_good_counts_as_bad(
    folder: Path, name: str, value: int, field: str, seen: bool
) -> None:
    changes: dict[str, Any] = {name: value}
    state = attester(Driver(DevTee.load(folder), **changes), folder).state()
    assert getattr(state, field) is seen


def _first(count: int) -> Callable[[bytes], bytes]:
    end = b"-----END CERTIFICATE-----\n"
    return lambda pem: end.join(pem.split(end)[:count]) + end


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"report_size": 0}, "ATTESTER_GPU_SIZE"),
        ({"report_size": 0x2001}, "ATTESTER_GPU_SIZE"),
        ({"report_size": 0xFFFFFFFF}, "ATTESTER_GPU_SIZE"),
        ({"pem_size": 0}, "ATTESTER_GPU_SIZE"),
        ({"pem_size": 0x1401}, "ATTESTER_GPU_SIZE"),
        ({"nonce": bytes(32)}, "ATTESTER_GPU_REPORT"),
        ({"pem": _first(4)}, "ATTESTER_GPU_CHAIN"),
        ({"pem": lambda pem: b"x" + pem[1:]}, "ATTESTER_GPU_CHAIN"),
        ({"multiGpuMode": 1}, "ATTESTER_GPU_PPCIE"),
        ({"multiGpuMode": 7}, "ATTESTER_GPU_MODE"),
        ({"count": 0}, "ATTESTER_GPU_COUNT"),
        ({"count": 17}, "ATTESTER_GPU_COUNT"),
        ({"lost": 0}, "ATTESTER_NVML"),
        ({"settings": pynvml.NVML_ERROR_NOT_SUPPORTED}, "ATTESTER_NVML"),
    ],
    ids=str,
)
def test_answer_that_cannot_be_is_an_error(folder: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(AttesterError) as refused:
        attester(Driver(DevTee.load(folder), **changes), folder).collect(NONCE)
    assert refused.value.code == code


def test_one_lost_gpu_of_three_gives_no_evidence_of_two(folder: Path) -> None:
    with pytest.raises(AttesterError):
        attester(Driver(DevTee.load(folder), (0x10, 0x20, 0x30), lost=1), folder).collect(NONCE)


@pytest.mark.parametrize("lie", ["gpu.unlisted=1", "gpu.foreign_display=true"])
def test_display_device_that_the_driver_does_not_count_is_refused(folder: Path, lie: str) -> None:
    with running_machine(folder, "--set", lie):
        for script in (COLLECT, STATE):
            code, _, hint = run(folder, script)
            assert code == "ATTESTER_GPU_PCI" and "display device" in hint


@pytest.mark.parametrize("seen", [(0x10,), (0x10, 0x30), (0x10, 0x20, 0x30)])
def test_driver_and_bus_must_show_the_same_gpus(folder: Path, seen: tuple[int, ...]) -> None:
    driver = Driver(DevTee.load(folder), (0x10, 0x20))
    assert attester(driver, folder).state().count == 2
    with pytest.raises(AttesterError) as refused:
        attester(driver, folder, seen=seen).state()
    assert refused.value.code == "ATTESTER_GPU_PCI"


def test_machine_without_a_list_of_its_bus_gives_no_evidence(folder: Path) -> None:
    with pytest.raises(AttesterError) as refused:
        GpuAttester(Driver(DevTee.load(folder)), folder / "nowhere").collect(NONCE)
    assert refused.value.code == "ATTESTER_GPU_PCI" and "sysfs" in refused.value.hint


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_only_a_nonce_of_32_bytes_reaches_a_gpu(folder: Path, size: int) -> None:
    with pytest.raises(AttesterError) as refused:
        attester(Driver(DevTee.load(folder)), folder).collect(bytes(size))
    assert refused.value.code == "ATTESTER_GPU_NONCE"


def test_ready_state_that_did_not_change_is_an_error(folder: Path) -> None:
    with pytest.raises(AttesterError) as refused:
        attester(Driver(DevTee.load(folder), ready_stuck=True), folder).set_ready(True)
    assert refused.value.code == "ATTESTER_GPU_READY"
