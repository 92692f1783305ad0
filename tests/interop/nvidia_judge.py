"""Runs NVIDIA's own Python attestation SDK, unmodified, over a machine's evidence. Not a test: a program of its own.

Runs in `.venv-nvidia` only (its pins conflict with ours), with LD_LIBRARY_PATH naming the NVML stand-in and a fresh
working directory (importing the verifier deletes and creates `verifier.log` there). The only hooks are the paths of
the two roots and the service addresses; the answer goes to a file, because the verifier prints.

    python nvidia_judge.py DEVICE_ROOT.pem RIM_ROOT.pem RIM_URL OCSP_URL COLLECT_NONCE ATTEST_NONCE ANSWER.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    device_root, rim_root, rim_url, ocsp_url, collected_for, attested_for, answer = sys.argv[1:]
    from nv_attestation_sdk import attestation as sdk
    from verifier.config import BaseSettings

    BaseSettings.DEVICE_ROOT_CERT = device_root
    BaseSettings.RIM_ROOT_CERT = rim_root
    client = sdk.Attestation("devtee")
    client.set_claims_version("3.0")
    client.add_verifier(sdk.Devices.GPU, sdk.Environment.LOCAL, "", "", ocsp_url, rim_url)
    client.set_nonce(collected_for)
    evidence = client.get_evidence(options={"ppcie_mode": True, "no_gpu_mode": False})
    client.set_nonce(attested_for)
    verdict = client.attest(evidence)
    Path(answer).write_text(json.dumps({"verdict": verdict, "devices": len(evidence)}))


if __name__ == "__main__":
    main()
