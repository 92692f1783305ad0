"""A second opinion on GPU evidence: NVIDIA's own Python SDK, in its own environment, beside our verifier.

On request of an auditor only (`vouchsafe verify-gpu --second-opinion`): the SDK has defects that rule it out as a
client's verifier (it accepts one GPU shown twice, and a good GPU that stands before a tampered one, and looks at no
OCSP window). So it is shown beside our verdict and changes nothing about it.

It runs in its own process and in an empty working directory, without this process's environment, its output is thrown
away, its answer is a small file read under a cap, and it has a time limit. Runs on the auditor's machine; trusts
nothing that comes back beyond showing it.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from attestation import roots as built_in
from attestation.errors import FormatError, InputError
from attestation.policy import Roots

__all__ = ["DEFAULT_PYTHON", "ENVIRONMENT", "SecondOpinion", "ask", "find_python"]

ENVIRONMENT: Final = "VOUCHSAFE_NVIDIA_PYTHON"
DEFAULT_PYTHON: Final = Path(".venv-nvidia/bin/python")
SECONDS: Final = 60.0
MAX_ANSWER: Final = 64 * 1024
MAX_DETAIL: Final = 400
_JUDGE: Final = Path(__file__).with_name("nvidia_judge.py")


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """What NVIDIA's SDK said. Holding one proves nothing.

    verdict   `unavailable` when it could not judge: an endorsement it insists on was not given, it broke, or it took
              too long
    agrees    whether its verdict is ours; None when it is unavailable
    detail    one line: its complaints (it may complain and accept), or why there is no verdict
    """

    verdict: Literal["accepted", "refused", "unavailable"]
    agrees: bool | None
    detail: str

    def as_json(self) -> dict[str, object]:
        return {"verdict": self.verdict, "agrees": self.agrees, "detail": self.detail}


def find_python(given: str | None) -> Path:
    """The interpreter of the SDK's environment: *given*, else $VOUCHSAFE_NVIDIA_PYTHON, else .venv-nvidia beside the
    working directory. Raises `InputError` INPUT_SECOND_OPINION when there is none."""
    path = Path(given or os.environ.get(ENVIRONMENT) or DEFAULT_PYTHON)
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise InputError(
            "INPUT_SECOND_OPINION",
            "the environment of NVIDIA's verifier is not there",
            expected="a Python 3.11 or 3.12 with nv-attestation-sdk 2.7.3",
            actual=str(path),
            hint=f"tests/interop/setup_nvidia.sh makes one; name another by --nvidia-python or ${ENVIRONMENT}",
        )
    return path.absolute()  # not resolved: a virtual environment is known by the link's own place


def ask(
    python: Path,
    gpus: Sequence[object],
    *,
    switches: int,
    nonce: bytes,
    at: int,
    rims: Mapping[str, bytes],
    ocsp: Mapping[str, bytes],
    roots: Roots,
    accepted: bool,
    seconds: float = SECONDS,
) -> SecondOpinion:
    """NVIDIA's verdict on *gpus* (entries of its JSON shape, already read by `from_nvidia_json`) beside ours.

    switches   how many switches were shown too: its Python SDK judges none offline, and the detail says so
    accepted   our verdict
    """
    if not gpus:
        return SecondOpinion("unavailable", None, "there is no GPU in the evidence, and it judges no switches offline")
    job = {
        "evidence": [{k: str(e.get(k, "")) for k in ("certificate", "evidence", "arch")} for e in _entries(gpus)],
        "nonce": nonce.hex(),
        "at": at,
        "rims": _text(rims),
        "ocsp": _text(ocsp),
        "roots": {
            "device": None if roots.nvidia_device == built_in.NVIDIA_DEVICE_ROOT else _pem(roots.nvidia_device),
            "rim": None if roots.nvidia_rim == built_in.NVIDIA_RIM_ROOT else _pem(roots.nvidia_rim),
        },
    }
    with tempfile.TemporaryDirectory(prefix="vouchsafe-second-opinion-") as folder:
        raw, problem = _run(python, Path(folder), json.dumps(job), seconds)
    if raw is None:
        return SecondOpinion("unavailable", None, problem)
    return _read(raw, switches=switches, accepted=accepted)


def _run(python: Path, folder: Path, job: str, seconds: float) -> tuple[bytes | None, str]:
    """The answer's bytes, or None and why there is none. Whatever the judge started is gone afterwards."""
    work = folder / "work"
    work.mkdir()
    (folder / "job.json").write_text(job)
    answer = folder / "answer.json"
    # Nothing of ours is inherited: the SDK takes service addresses, keys and leniency from NV_… and NVIDIA_….
    environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "HOME": str(work), "TMPDIR": str(work)}
    with subprocess.Popen(
        [str(python), "-I", "-B", str(_JUDGE), str(folder / "job.json"), str(answer)],
        cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None, f"it did not answer within {seconds:g} s"
        finally:
            _stop(process)
    if status != 0 or not answer.is_file():
        return None, f"it stopped without an answer (status {status}): is nv-attestation-sdk 2.7.3 installed there?"
    with answer.open("rb") as file:
        raw = file.read(MAX_ANSWER + 1)
    return (raw, "") if len(raw) <= MAX_ANSWER else (None, "its answer is too long")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the judge's whole session; without one left there is nothing to end."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _read(raw: bytes, *, switches: int, accepted: bool) -> SecondOpinion:
    try:
        told = json.loads(raw)
        said, missing, theirs = told["said"], told["missing"], told["accepted"]
        complaints = [str(line) for line in said]
        wanted = [str(name) for name in missing]
    except (ValueError, TypeError, KeyError, RecursionError):
        return SecondOpinion("unavailable", None, "its answer cannot be read")
    if wanted and theirs is not True:
        return SecondOpinion("unavailable", None, _short(f"it insists on what was not given: {', '.join(wanted)}"))
    verdict: Literal["accepted", "refused"] = "accepted" if theirs is True else "refused"
    detail = "; ".join(complaints) or ("" if theirs is True else "it gave no reason")
    if switches:
        detail = f"{detail}; {switches} switches not judged" if detail else f"{switches} switches not judged"
    return SecondOpinion(verdict, (theirs is True) == accepted, _short(detail))


def _short(text: str) -> str:
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"


def _entries(gpus: Sequence[object]) -> list[Mapping[str, Any]]:  # Any: JSON values, made text above
    found: list[Mapping[str, Any]] = [entry for entry in gpus if isinstance(entry, dict)]
    if len(found) != len(gpus):
        raise FormatError("FORMAT_GPU_JSON", "the evidence is not a list of objects")
    return found


def _text(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(raw).decode() for name, raw in files.items()}


def _pem(der: bytes) -> str:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
