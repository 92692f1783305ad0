"""NVIDIA's own verifier accepts the development TEE's evidence, and refuses what it can refuse.

Its whole road is used: it collects through nvidia-ml-py and the NVML stand-in, fetches RIMs and OCSP answers over
HTTP from a small server here, and verifies. Only the two roots are replaced. Needs `.venv-nvidia`
(`tests/interop/setup_nvidia.sh`); skips out loud without it.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest

from tests.devtee.ocsp import OcspSpec, answer_request
from tests.devtee.rim import RimSpec
from tests.devtee.running import REPOSITORY, running_machine
from tests.devtee.tee import DevTee

PYTHON: Final = REPOSITORY / ".venv-nvidia" / "bin" / "python"
JUDGE: Final = Path(__file__).with_name("nvidia_judge.py")
NONCE: Final = "5a" * 32
OTHER: Final = "a5" * 32

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="NVIDIA's verifier is not installed: run tests/interop/setup_nvidia.sh"
)


@contextmanager
def services(tee: DevTee, rim: RimSpec, ocsp: OcspSpec) -> Iterator[str]:
    """NVIDIA's RIM service (GET /rim/<id>) and OCSP service (POST /ocsp/) for one machine, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = tee.rims(rim).get(self.path.removeprefix("/rim/"))
            if text is None:
                self.send_error(404)
                return
            self._send(json.dumps({"id": self.path[5:], "rim": base64.b64encode(text).decode()}).encode())

        def do_POST(self) -> None:
            request = self.rfile.read(min(int(self.headers["Content-Length"]), 4096))
            self._send(answer_request(tee.pki, request, int(time.time()), ocsp))

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Verdict:
    accepted: bool
    devices: int
    log: str


def judge(
    tmp_path: Path,
    *machine: str,
    attest_nonce: str = NONCE,
    rim: RimSpec | None = None,
    ocsp: OcspSpec | None = None,
    foreign_root: bool = False,
) -> Verdict:
    """Start a machine with the arguments *machine*, let NVIDIA's verifier collect and judge."""
    state, work, answer = tmp_path / "state", tmp_path / "work", tmp_path / "answer.json"
    work.mkdir()
    with running_machine(state, *machine):
        tee = DevTee.load(state)
        roots = state / "roots"
        if foreign_root:
            other = DevTee.create(tmp_path / "other", gpus=1)
            (work / "device.pem").write_bytes(other.roots_pem["nvidia_device"])
        device_root = work / "device.pem" if foreign_root else roots / "nvidia_device.pem"
        with services(tee, rim or RimSpec(), ocsp or OcspSpec()) as url:
            done = subprocess.run(
                [PYTHON, JUDGE, device_root, roots / "nvidia_rim.pem", f"{url}/rim/", f"{url}/ocsp/",
                 NONCE, attest_nonce, answer],
                cwd=work, env=_environment(state), capture_output=True, text=True, timeout=90,
            )  # fmt: skip
    assert answer.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads(answer.read_text())
    return Verdict(said["verdict"], said["devices"], done.stdout + done.stderr)


def _environment(state: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NV_", "NVIDIA_", "PYTHON"))}
    return kept | {"LD_LIBRARY_PATH": str(state / "lib")}


def test_one_gpu_is_accepted_on_every_count(tmp_path: Path) -> None:
    verdict = judge(tmp_path)
    assert verdict.accepted is True and verdict.devices == 1, verdict.log[-3000:]
    for line in ("RIM Schema validation passed", "RIM signature verification successful"):
        assert verdict.log.count(line) == 2, verdict.log[-3000:]


def test_two_gpus_are_accepted(tmp_path: Path) -> None:
    verdict = judge(tmp_path, "--gpus", "2")
    assert verdict.accepted is True and verdict.devices == 2, verdict.log[-3000:]


def test_evidence_for_another_nonce_is_refused(tmp_path: Path) -> None:
    verdict = judge(tmp_path, attest_nonce=OTHER)
    assert verdict.accepted is False and "nonce" in verdict.log.lower()


def test_wrong_golden_value_is_refused(tmp_path: Path) -> None:
    assert judge(tmp_path, rim=RimSpec(values={30: b"\1" * 48})).accepted is False


def test_rim_of_another_version_is_refused(tmp_path: Path) -> None:
    assert judge(tmp_path, rim=RimSpec(driver="1.2.3")).accepted is False


def test_revoked_device_is_refused(tmp_path: Path) -> None:
    verdict = judge(tmp_path, ocsp=OcspSpec(revoked=frozenset({"device-ik-0"})))
    assert verdict.accepted is False and "REVOKED" in verdict.log


def test_foreign_device_root_is_refused(tmp_path: Path) -> None:
    assert judge(tmp_path, foreign_root=True).accepted is False
