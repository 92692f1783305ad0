"""Make the one `.venv` of the make targets: check first, say what comes, install by hash. Standard library, no root.

    python3.11 images/locks/setup.py [--torch-index URL]

A second run with an unchanged lock takes a moment. Exit 0 when the environment is there, 1 with a remedy otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "images/locks/cpu-py311.txt"
VENV = ROOT / ".venv"
STAMP = VENV / "vouchsafe-lock"
DOWNLOAD_GB, DISK_GB = 0.8, 3.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", ""), metavar="URL")
    options = parser.parse_args()
    wanted = hashlib.sha256(LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    check()
    print(f"setup: downloads about {DOWNLOAD_GB} GB, takes about {DISK_GB} GB of disk in .venv", flush=True)
    started = time.monotonic()
    if not (VENV / "bin/python").exists():
        run([sys.executable, "-m", "venv", str(VENV)], "could not make .venv", "is python3-venv there? `make system`")
    torch(options.torch_index)
    print("setup: the locked packages …", flush=True)
    pip(
        ["-r", str(LOCK)], "a locked package could not be installed", "see pip's message above; then `make setup` again"
    )
    pip(["--no-build-isolation", "-e", str(ROOT)], "vouchsafe itself could not be installed", "see pip's message above")
    STAMP.write_text(wanted)
    print(f"setup: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def check() -> None:
    """What must hold before anything is fetched."""
    if sys.version_info[:2] != (3, 11) or platform.python_implementation() != "CPython":
        stop(f"CPython 3.11 is needed, this is {sys.version.split()[0]}", "`make setup PYTHON=python3.11`")
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        stop(f"the lock is for Linux x86_64, this is {sys.platform} {platform.machine()}", "use such a machine")
    for tool in ("cc", "c++"):
        if shutil.which(tool) is None:
            stop(f"no {tool} found", "`make system` as root installs a compiler")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB and not STAMP.exists():
        stop(f"{free:.1f} GB of disk are free, {DISK_GB} GB are needed", "make room")


def torch(index: str) -> None:
    """PyTorch's CPU build first, by hash: the only wheel that the usual index does not have."""
    lines = [line.split("#")[0].strip() for line in LOCK.read_text().splitlines() if line.startswith("torch==")]
    want = lines[0].split()[0]
    have = subprocess.run(
        [str(VENV / "bin/python"), "-c", "import importlib.metadata as m; print('torch==' + m.version('torch'))"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    if have == want:
        return
    print(f"setup: {want} …", flush=True)
    part = VENV / "torch.txt"
    part.write_text(lines[0] + "\n")
    extra = ["--extra-index-url", index] if index else []
    pip(
        [*extra, "-r", str(part)], f"pip finds no {want} with the locked hash",
        "`make setup TORCH_INDEX=<the URL of PyTorch's index of CPU wheels>`",
    )  # fmt: skip
    part.unlink()


def pip(arguments: list[str], failure: str, hint: str) -> None:
    """Install exactly what is named. Progress is one line on a terminal, one line per 25 packages elsewhere."""
    hashes = ["--require-hashes"] if "-r" in arguments else []
    base = [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    command = [*base, "--progress-bar", "off", *hashes, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    listed = Path(arguments[arguments.index("-r") + 1]) if hashes else None
    total = sum("==" in line for line in listed.read_text().splitlines()) if listed else 1
    count, tail, tty = 0, list[str](), sys.stdout.isatty()
    for line in process.stdout:
        tail = [*tail[-14:], line.rstrip()]
        if line.startswith(("Collecting ", "Processing ")):
            count += 1
            name = line.split()[1].split("=")[0].rsplit("/", 1)[-1][:40]
            if tty:
                print(f"\r  {count}/{total} {name:<40}", end="", flush=True)
            elif count % 25 == 0:
                print(f"  {count}/{total}", flush=True)
        elif line.startswith("Installing collected packages") and count:
            print(f"{chr(13) if tty else ''}  unpacking {count} of {total} {'':<40}", flush=True)
    if process.wait() != 0:
        print("\n".join(tail), file=sys.stderr)
        stop(failure, hint)


def run(command: list[str], failure: str, hint: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        stop(failure, hint)


def stop(what: str, hint: str) -> NoReturn:
    print(f"error: {what}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(main())
