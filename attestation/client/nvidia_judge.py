"""NVIDIA's own Python verifier over evidence in a file. A program of its own, for `second_opinion`; not imported by us.

Runs in the environment of nv-attestation-sdk, whose pins conflict with ours, in a fresh working directory (importing
the verifier deletes and creates `verifier.log` there), with `python -I -B`. The SDK is unmodified but for its edges:

    roots       paths of two class attributes, when the caller names roots of its own
    RIM, OCSP   the two functions that would ask NVIDIA's services answer from the file: nothing leaves this machine
    clock       certificates are judged at the job's time, as ours are: it knows none but this machine's
    NVML        "is this machine in developer mode" is answered no: there is no driver behind evidence in a file
    OCSP nonce  off: recorded answers carry none

    python -I -B nvidia_judge.py JOB.json ANSWER.json

JOB: evidence [{certificate, evidence, arch}] in NVIDIA's shape, nonce (hex), at (unix seconds), rims (id → base64),
ocsp (name → base64), roots {device, rim} (PEM or null). ANSWER: accepted, missing (what the job lacked), said (its
complaints).
"""

from __future__ import annotations

import base64
import json
import logging
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any  # Any: NVIDIA's modules have no types, and are not there when this file is type-checked

ARCHITECTURES = {"HOPPER": 9, "BLACKWELL": 10}
"""NVML's numbers."""
MAX_COMPLAINTS = 8


class Device:
    """One GPU as NVIDIA's verifier asks for it; versions come from NVIDIA's reading of the report."""

    def __init__(self, number: int, entry: dict[str, str]) -> None:
        config, utils = import_module("verifier.config"), import_module("verifier.utils")
        self.architecture = ARCHITECTURES.get((entry.get("arch") or "HOPPER").upper(), 0)
        self.uuid = f"GPU-{number}"
        self.report = base64.b64decode(entry["evidence"])
        settings = config.GPU_ARCHITECTURE_MAP[self.architecture]
        parsed = import_module("verifier.attestation").AttestationReport(self.report, settings)
        said = parsed.get_response_message().get_opaque_data()
        self.driver: str = said.get_data("OPAQUE_FIELD_ID_DRIVER_VERSION").decode().rstrip("\0")
        self.vbios: str = utils.format_vbios_version(said.get_data("OPAQUE_FIELD_ID_VBIOS_VERSION"))
        pem = base64.b64decode(entry["certificate"])
        handle = import_module("verifier.nvml.test_handle").TestHandle(pem)
        self.chain = import_module("verifier.nvml").GpuCertificateChains(handle).GpuAttestationCertificateChain

    def get_gpu_architecture(self) -> int:
        return self.architecture

    def get_uuid(self) -> str:
        return self.uuid

    def get_driver_version(self) -> str:
        return self.driver

    def get_vbios_version(self) -> str:
        return self.vbios

    def get_attestation_report(self) -> bytes:
        return self.report

    def get_attestation_cert_chain(self) -> list[Any]:
        return list(self.chain)


class Complaints(logging.Handler):
    """The errors that the verifier logs, and what it asked for in vain."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []
        self.missing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())
        cause = record.exc_info[1] if record.exc_info else None
        while cause is not None:  # it logs what it raised, and hides why
            self.add(str(cause))
            cause = cause.__cause__ or cause.__context__

    def add(self, text: str) -> None:
        text = text.strip()[:300]
        if text and text not in self.said and len(self.said) < MAX_COMPLAINTS:
            self.said.append(text)


class Judge:
    """The SDK, made ready for one job; `verdict` may be asked again and again (the benchmark does)."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.complaints = Complaints()
        self.sdk = import_module("nv_attestation_sdk.attestation")
        self.settings = import_module("verifier.config").BaseSettings
        for name in ("gpu-verifier-info", "gpu-verifier-event", "nv-attestation-sdk", "sdk-logger"):
            logging.getLogger(name).addHandler(self.complaints)
        self._roots()
        self._services()
        self._clock()
        import_module("verifier.nvml").NvmlHandler.is_cc_dev_mode = staticmethod(lambda: False)
        self.client = self.sdk.Attestation("second opinion")
        self.client.set_claims_version("3.0")
        self.client.set_ocsp_nonce_disabled(True)
        self.client.add_verifier(self.sdk.Devices.GPU, self.sdk.Environment.LOCAL, "", "", "", "")
        self.client.set_nonce(job["nonce"])

    def devices(self) -> list[Device]:
        """The evidence as NVIDIA's verifier takes it; raises what its parsers raise."""
        return [Device(number, entry) for number, entry in enumerate(self.job["evidence"])]

    def verdict(self, devices: list[Device]) -> bool:
        return self.client.attest(devices) is True

    def _roots(self) -> None:
        for name, attribute in (("device", "DEVICE_ROOT_CERT"), ("rim", "RIM_ROOT_CERT")):
            if self.job["roots"][name] is not None:
                path = Path.cwd() / f"{name}-root.pem"
                path.write_text(self.job["roots"][name])
                setattr(self.settings, attribute, str(path))

    def _clock(self) -> None:
        context = import_module("OpenSSL.crypto").X509StoreContext
        plain, at = context.__init__, datetime.fromtimestamp(self.job["at"], UTC)

        def timed(made: Any, store: Any, *arguments: Any, **named: Any) -> None:
            store.set_time(at)
            plain(made, store, *arguments, **named)

        context.__init__ = timed

    def _services(self) -> None:
        ocsp = import_module("cryptography.x509.ocsp")
        rims = {name: base64.b64decode(text).decode() for name, text in self.job["rims"].items()}
        answers = {}
        for text in self.job["ocsp"].values():
            try:
                answer = ocsp.load_der_ocsp_response(base64.b64decode(text))
                answers[(answer.serial_number, answer.issuer_key_hash)] = answer
            except ValueError:
                self.complaints.add("an OCSP answer cannot be read")

        def rim(name: str) -> str:
            if name not in rims:
                self.complaints.missing.append(f"RIM {name}")
                raise LookupError(f"no RIM {name}")
            return rims[name]

        def status(request: bytes) -> Any:
            asked = ocsp.load_der_ocsp_request(request)
            found = answers.get((asked.serial_number, asked.issuer_key_hash))
            if found is None:
                self.complaints.missing.append(f"OCSP answer for certificate {asked.serial_number:x}")
                raise LookupError("no OCSP answer")
            return found

        tools = import_module("verifier.cc_admin").CcAdminUtils
        tools.fetch_rim_file, tools.send_ocsp_request = staticmethod(rim), staticmethod(status)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    judge = Judge(job)
    try:
        accepted = judge.verdict(judge.devices())
    except Exception as err:  # its parsers raise many kinds; each is a refusal
        accepted = False
        judge.complaints.add(f"{type(err).__name__}: {err}")
    found = {"accepted": accepted, "missing": judge.complaints.missing, "said": judge.complaints.said}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
