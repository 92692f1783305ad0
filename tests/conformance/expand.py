"""The conformance table for whoever wants to run it: expand cases into JSON lines, and grade the answers.

    python -m tests.conformance.expand tdx             one input per line, as `vouchsafe verify-quote --batch` reads it
    python -m tests.conformance.expand gpu             the same for `vouchsafe verify-gpu --batch`
    python -m tests.conformance.expand --grade FILE    compare answers {id, verdict, codes} with the table

Standard library alone, and no import of this project: another implementation copies this file, `cases.jsonl` and
`blobs.tar.xz`. Trusts the two data files, which are read once.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MAX_BLOB = 1 << 20


def load_blobs(path: Path = FOLDER / "blobs.tar.xz") -> dict[str, bytes]:
    """Every blob by name: the first 20 hex digits of its SHA-256, which is checked."""
    found = {}
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None or member.size > MAX_BLOB:
                raise ValueError(f"{path}: {member.name} is not a blob")
            raw = file.read()
            if hashlib.sha256(raw).hexdigest()[:20] != member.name:
                raise ValueError(f"{path}: {member.name} is damaged")
            found[member.name] = raw
    return found


def load_cases(path: Path = FOLDER / "cases.jsonl") -> list[dict[str, Any]]:  # Any: JSON values
    """The rows of the table in order, blobs not yet filled in."""
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def inputs(cases: Iterable[Mapping[str, Any]], blobs: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Case id → the whole input: a control's own, or its control's with the case's patch applied."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        patch = filled(case["patch"], blobs)
        whole = merged(found[case["control"]], patch) if case["control"] else patch
        found[case["id"]] = {**whole, "id": case["id"]}
    return found


def merged(target: Any, patch: Any) -> Any:  # Any: JSON values
    """JSON Merge Patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def filled(value: Any, blobs: Mapping[str, bytes]) -> Any:  # Any: JSON values
    """*value* with `base64:NAME`, `hex:NAME` and `text:NAME` replaced by the blob in that spelling."""
    if isinstance(value, dict):
        return {name: filled(member, blobs) for name, member in value.items()}
    if isinstance(value, list):
        return [filled(member, blobs) for member in value]
    if isinstance(value, str):
        spelling, colon, name = value.partition(":")
        if colon and spelling in ("base64", "hex", "text"):
            raw = blobs[name]
            if spelling == "text":
                return raw.decode("utf-8", "surrogatepass")
            return raw.hex() if spelling == "hex" else base64.b64encode(raw).decode()
    return value


def grade(case: Mapping[str, Any], answer: Mapping[str, Any] | None, *, strict: bool = True) -> str:  # Any: JSON values
    """What is wrong with *answer*, empty when nothing is. Not *strict*: `also` may hold more than was answered, and the
    answer more than `code` and `also`: for verifiers that stop early or look at more."""
    if answer is None:
        return "no answer"
    if answer.get("verdict") != case["expect"]:
        return f"verdict {answer.get('verdict')}, expected {case['expect']}; codes {answer.get('codes')}"
    codes, wanted = set(answer.get("codes", ())), {case["code"], *case["also"]} - {""}
    if strict and codes != wanted:
        return f"codes {sorted(codes)}, expected {sorted(wanted)}"
    if case["code"] and case["code"] not in codes:
        return f"code {case['code']} is missing among {sorted(codes)}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="expand", description="expand the conformance table, or grade answers")
    parser.add_argument(
        "kind", nargs="?", choices=("tdx", "gpu", "bundle"), help="print the inputs of this kind, one per line"
    )
    parser.add_argument("--grade", metavar="FILE", help="JSON lines of answers to compare")
    parser.add_argument("--verdicts", action="store_true", help="compare verdicts and the first code alone")
    options = parser.parse_args()
    if (options.kind is None) == (options.grade is None):
        parser.error("give a kind, or --grade FILE")
    cases = load_cases()
    if options.kind:
        whole = inputs(cases, load_blobs())
        for case in cases:
            if case["kind"] == options.kind:
                print(json.dumps(whole[case["id"]], separators=(",", ":")))
        return 0
    answers = {a["id"]: a for a in map(json.loads, Path(options.grade).read_text().splitlines())}
    asked = {c["kind"] for c in cases if c["id"] in answers}
    graded = [c for c in cases if c["kind"] in asked]
    wrong = {c["id"]: told for c in graded if (told := grade(c, answers.get(c["id"]), strict=not options.verdicts))}
    for name, told in wrong.items():
        print(f"{name}: {told}")
    print(f"{len(graded) - len(wrong)} of {len(graded)} as expected")
    return 1 if wrong or not graded else 0


if __name__ == "__main__":
    sys.exit(main())
