"""Three lies and what the client says to each: a swapped certificate, a flipped byte, an edited number."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from attestation.bundle import Bundle
from attestation.ratls import Leaf
from tests.demo.processes import PYTHON, ROOT, Failed

CLI = (PYTHON, "-m", "attestation.client.cli")


def cli(*arguments: str, expect: int) -> str:
    """Run `vouchsafe …` and return what it printed; `Failed` when its exit status is not the expected one."""
    done = subprocess.run([*CLI, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    text = done.stdout + done.stderr
    if done.returncode != expect:
        raise Failed(
            f"vouchsafe {arguments[0]}",
            f"exit {done.returncode} instead of {expect}: {text.strip()[-400:]}",
            "read its output",
        )
    return text


def refused(text: str) -> str:
    """Of a JSON result: the failed checks, one line each, as a person reads them."""
    result = json.loads(text[text.index("{") :])
    if result["verdict"] != "refused":
        raise Failed("refusals", "a lie was accepted", "this is a bug: please report it")
    lines = []
    for check in result["checks"]:
        if check["status"] == "fail":
            lines.append(f"{check['code']}: {check['reason']}")
            if check["expected"] and check["actual"]:
                lines.append(f"  expected {check['expected'][:40]}, got {check['actual'][:40]}")
    return "\n".join(lines)


def flipped_quote(bundle: Path, folder: Path) -> tuple[Path, Path]:
    """The bundle's quote with one bit of MRTD flipped, and the collateral, as files."""
    read = Bundle.decode(bundle.read_bytes())
    quote = bytearray(Leaf.parse(read.evidence.leaf).extension.quote)
    quote[48 + 136] ^= 1
    (folder / "flipped.bin").write_bytes(quote)
    (folder / "collateral.json").write_bytes(read.endorsements.collateral)
    return folder / "flipped.bin", folder / "collateral.json"


def edited_receipt(receipt: Path, folder: Path) -> Path:
    """The receipt, served one second later."""
    text = receipt.read_text()
    edited, count = re.subn(r'("served_at": ?)(\d+)', lambda m: f"{m[1]}{int(m[2]) + 1}", text)
    if count != 1:
        raise Failed("refusals", "the receipt has no served_at", "this is a bug: please report it")
    (folder / "edited.json").write_text(edited)
    return folder / "edited.json"
