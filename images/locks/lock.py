"""Refresh a lock: versions in `<name>.in` → versions and SHA-256 of the wheels in `<name>.txt`.

    python images/locks/lock.py images/locks/cpu-py311.in

Resolves nothing: the `.in` file lists every package, so that a change of a transitive dependency is a line in a diff.
Runs on the platform the lock is for (CPython 3.11, Linux x86_64). The lock names no index: pip's own configuration says
where wheels come from, the hashes say which.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not argv[0].endswith(".in"):
        print("usage: python images/locks/lock.py FILE.in", file=sys.stderr)
        return 2
    source = Path(argv[0])
    target = source.with_suffix(".txt")
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-qqq", "--dry-run", "--ignore-installed", "--no-deps"),
            *("--only-binary=:all:", "--report", "-", "-r", str(source)),
        ],
        check=True, stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    lines = []
    for item in json.loads(report)["install"]:
        meta, info = item["metadata"], item["download_info"]
        wheel = Path(urlsplit(info["url"]).path).name
        digest = info["archive_info"]["hashes"]["sha256"]
        lines.append((meta["name"].lower().replace("_", "-"), f"{meta['name']}=={meta['version']}", digest, wheel))
    before = set(target.read_text().splitlines()) if target.exists() else set()
    text = f"# Made by images/locks/lock.py from {source.name}. CPython 3.11, Linux x86_64.\n"
    for _, pin, digest, wheel in sorted(lines):
        text += f"{pin} --hash=sha256:{digest}  # {wheel.replace('%2B', '+')}\n"
    target.write_text(text)
    after = set(text.splitlines())
    for line in sorted(before - after):
        print("-", line)
    for line in sorted(after - before):
        print("+", line)
    print(f"{target}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
