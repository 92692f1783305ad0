"""Every shared vector through the commands a user has: `python -m tests.run_vectors`.

Feeds `vouchsafe verify-quote --batch` and `verify-gpu --batch`, compares each verdict with the vector's own, and prints
how many gave it. Exit 1 when one does not, 0 with a loud line when the vectors are absent.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from attestation.client.cli import main as vouchsafe
from tests.vectors import VECTORS, cases

Case = dict[str, Any]


def main() -> int:
    if not VECTORS.is_dir():
        print(f"vectors: SKIPPED, none at {VECTORS} (set VOUCHSAFE_VECTORS)")
        return 0
    wrong = 0
    for kind, command, build in (("tdx", "verify-quote", tdx_case), ("gpu", "verify-gpu", gpu_case)):
        expected = {}
        lines = []
        for folder in cases(kind):
            case = json.loads((folder / "case.json").read_text())
            if kind == "gpu" or case["kind"] == "quote":
                lines.append(json.dumps(build(folder, case)))
                expected[case["id"]] = {"accept": "accepted", "refuse": "refused"}[case["expect"]]
        answers = batch(command, lines)
        differing = [i for i, verdict in expected.items() if answers.get(i, {}).get("verdict") != verdict]
        for id in differing:
            print(f"vectors: {kind} {id}: expected {expected[id]}, got {answers.get(id)}", file=sys.stderr)
        wrong += len(differing)
        print(f"vectors: {len(expected) - len(differing)} of {len(expected)} {kind} cases gave their verdict")
    return 1 if wrong else 0


def batch(command: str, lines: list[str]) -> dict[str, Case]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.jsonl"
        file.write_text("\n".join(lines) + "\n")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = vouchsafe([command, "--batch", str(file)])
    if status != 0:
        raise SystemExit(f"error: vouchsafe {command} --batch ended with {status}")
    return {answer["id"]: answer for answer in map(json.loads, out.getvalue().splitlines())}


def tdx_case(folder: Path, case: Case) -> Case:
    made = {
        "id": case["id"], "quote": blob(folder / "quote.bin"), "at": case["at"],
        "collateral": json.loads((folder / "collateral.json").read_text()), "min_tcb_evaluation": case["eval_floor"],
    }  # fmt: skip
    for name in ("ccel.bin", "eventlog.json"):
        if (folder / name).exists():
            made["event_log"] = blob(folder / name)
    if (folder / "root.der").exists():
        made["root"] = blob(folder / "root.der")
    return made


def gpu_case(folder: Path, case: Case) -> Case:
    def listed(name: str) -> Any:  # Any: NVIDIA's JSON
        return json.loads((folder / name).read_text()) if (folder / name).exists() else []

    return {
        "id": case["id"], "evidence": listed("evidence.json"), "switches": listed("switches.json"),
        **{key: case[key] for key in ("nonce", "at", "mode", "count", "require")},
        "rims": {f.name.removesuffix(".xml"): blob(f) for f in folder.glob("rims/*.xml")},
        "ocsp": {f.name.removesuffix(".der"): blob(f) for f in folder.glob("ocsp/*.der")},
    }  # fmt: skip


def blob(file: Path) -> str:
    return base64.b64encode(file.read_bytes() if file.exists() else b"").decode()


if __name__ == "__main__":
    raise SystemExit(main())
