"""GPU evidence: ours with the RIMs in the cache, on reports never seen before, beside NVIDIA's own Python verifier."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from attestation.gpu import GpuEndorsements, GpuEvidence, from_nvidia_json
from attestation.policy import Policy, Roots, platform_policy
from attestation.verifier import verify_gpu
from tests.bench.rows import Row, at_least, at_most, interleaved
from tests.devtee.pki import Pki
from tests.devtee.running import REPOSITORY
from tests.devtee.tee import DevTee

PYTHON = REPOSITORY / ".venv-nvidia" / "bin" / "python"
PEER = Path(__file__).with_name("nvidia_peer.py")
JUDGE = REPOSITORY / "attestation" / "client" / "nvidia_judge.py"
SPEEDUP = 8
NVIDIA = "nv-attestation-sdk 2.7.3, RIM and OCSP at hand"
Entries = list[dict[str, str]]


class Machine:
    """Eight GPUs of the development TEE, and fresh evidence of some of them for each question."""

    def __init__(self) -> None:
        self.tee = DevTee(Pki.fresh(8))
        self.now = int(time.time())
        self.endorsements = GpuEndorsements(self.tee.rims(), self.tee.ocsp(self.now, gpus=8))
        roots = self.tee.roots
        self.roots = Roots(roots.intel, roots.nvidia_device, roots.nvidia_rim)
        self.asked = 0

    def policy(self, gpus: int) -> Policy:
        return platform_policy(roots=self.roots, gpu_count=gpus, gpu_switches=0, gpu_mode="spt")

    def entries(self, gpus: int) -> tuple[bytes, Entries]:
        """A nonce never used before, and the reports that *gpus* devices made for it."""
        self.asked += 1
        nonce = self.asked.to_bytes(32)
        return nonce, self.tee.gpu_evidence(nonce, range(gpus))

    def judge(self, nonce: bytes, evidence: GpuEvidence, policy: Policy) -> None:
        result = verify_gpu(evidence, self.endorsements, policy, nonce=nonce, now=self.now)
        assert result.accepted, result.codes

    def fresh(self, gpus: int, policy: Policy) -> float:
        return self.ours(*self.entries(gpus), policy)

    def ours(self, nonce: bytes, entries: Entries, policy: Policy) -> float:
        """Milliseconds from NVIDIA's JSON to the verdict."""
        started = time.perf_counter()
        self.judge(nonce, from_nvidia_json(entries, []), policy)
        return (time.perf_counter() - started) * 1000


def rows(rounds: int) -> list[Row]:
    machine = Machine()
    found = []
    for gpus, limit in ((1, 15.0), (8, 100.0)):
        ms = interleaved({"ours": partial(machine.fresh, gpus, machine.policy(gpus))}, rounds=rounds * 2)
        found.append(at_most(f"{gpus} GPU(s), fresh reports, RIMs cached (ms)", ms["ours"], limit, "ms"))
    if not PYTHON.exists():
        print("bench: NVIDIA's verifier is not installed, no comparison: run tests/interop/setup_nvidia.sh", flush=True)
        return found
    for gpus, turns in ((1, rounds), (8, max(3, rounds // 3))):
        found.append(_against_nvidia(machine, gpus, turns))
    return found


def _against_nvidia(machine: Machine, gpus: int, rounds: int) -> Row:
    nonce, entries = machine.entries(gpus)
    policy = machine.policy(gpus)
    with nvidia(machine, nonce, entries) as ask:
        ms = interleaved({"ours": lambda: machine.ours(nonce, entries, policy), "theirs": ask}, rounds=rounds)
    name = f"{gpus} GPU(s), the same evidence (ms)"
    return at_least(name, ms["ours"], ms["theirs"], NVIDIA, SPEEDUP)


@contextmanager
def nvidia(machine: Machine, nonce: bytes, entries: Entries) -> Iterator[Any]:  # Any: a function that takes its turn
    """NVIDIA's verifier, warm, in its own process and directory; each call is one verdict and its milliseconds."""
    pem = {name: text.decode() for name, text in machine.tee.roots_pem.items()}
    job = {
        "evidence": entries,
        "nonce": nonce.hex(),
        "at": machine.now,
        "rims": _text(machine.endorsements.rims),
        "ocsp": _text(machine.endorsements.ocsp),
        "roots": {"device": pem["nvidia_device"], "rim": pem["nvidia_rim"]},
    }
    with tempfile.TemporaryDirectory(prefix="vouchsafe-bench-") as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job))
        command = [str(PYTHON), "-I", "-B", str(PEER), str(JUDGE), "job.json"]
        with subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            written, read = peer.stdin, peer.stdout

            def ask() -> float:
                written.write("\n")
                written.flush()
                line = read.readline()
                if not line:
                    raise RuntimeError("NVIDIA's verifier refused or stopped")
                return float(line)

            try:
                yield ask
            finally:
                written.close()
                peer.wait(60)


def _text(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: b64encode(raw).decode() for name, raw in files.items()}
