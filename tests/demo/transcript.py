"""Holds the README's transcript against what `make demo` really printed (it leaves its output in `build/demo.txt`).

    python -m tests.demo.transcript --check     exit 1 with the first difference
    python -m tests.demo.transcript --write     put the program's own output into the README

Digests, ports, times, sizes and seconds differ from run to run; they are compared by their kind. Long runs of passed
checks and claims are shortened, by the same rule on both sides.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys

from tests.demo.processes import ROOT

README = ROOT / "README.md"
OUTPUT = ROOT / "build/demo.txt"
BLOCK = re.compile(r"(<!-- make demo -->\n```text\n)(.*?)(```\n)", re.DOTALL)
KINDS = (
    (re.compile(r"not held here: .*"), "not held here: MEASURES"),  # another machine has swap, or a core pattern
    (re.compile(r"/tmp/vouchsafe-[A-Za-z0-9_]+"), "FOLDER"),
    (re.compile(r"\b(rcpt|chatcmpl|cmpl)[-_][A-Za-z0-9_-]+"), "ID"),
    (re.compile(r"\b[0-9a-f]{8,}(…|\.\.\.)?"), "DIGEST"),
    (re.compile(r"\b\d+(\.\d+)?\b"), "N"),
    (re.compile(r" +"), " "),
)


def abridged(text: str) -> str:
    """*text* with each run of more than six `pass` lines cut to its first two and last two, and long values cut."""
    lines: list[str] = []
    run: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("pass "):
            run.append(line)
            continue
        if len(run) > 6:
            indent = " " * (len(run[0]) - len(run[0].lstrip()))
            run = [*run[:2], f"{indent}… {len(run) - 4} more passed", *run[-2:]]
        lines += [*run, line if len(line) <= 118 else f"{line[:117]}…"]
        run = []
    return "\n".join(lines).rstrip() + "\n"


def normal(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        for pattern, kind in KINDS:
            line = pattern.sub(kind, line)
        lines.append(line.rstrip())
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="transcript")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    readme = README.read_text()
    found = BLOCK.search(readme)
    if found is None or not OUTPUT.exists():
        print("error: no transcript in README.md, or no build/demo.txt\nhint: run `make demo` first", file=sys.stderr)
        return 1
    output = abridged(OUTPUT.read_text())
    if options.write:
        README.write_text(readme[: found.start(2)] + output + readme[found.end(2) :])
        return 0
    wanted, actual = normal(found[2]), normal(output)
    if wanted != actual:
        print("\n".join(difflib.unified_diff(wanted, actual, "README.md", "build/demo.txt", lineterm="", n=1)))
        print("hint: if the new output is right: python -m tests.demo.transcript --write", file=sys.stderr)
        return 1
    print("README's transcript is the program's own output")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
