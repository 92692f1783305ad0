"""A short run over every target, and that the fuzzer would notice. `make fuzz` runs longer."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BROKEN = """
import sys, time
from pathlib import Path
import atheris
from tests.fuzz.__main__ import Limit, fuzz

def target(run):
    made = lambda data: run(data)
    made.seeds, made.size = (lambda: [b"seed"]), 64
    return made

@atheris.instrument_func
def crash(data):
    if data[:1] == b"c" and data[1:2] == b"r":
        raise IndexError("not the package's own error")

def hang(data):
    if data:
        time.sleep(60)

def grow(data):
    if data:
        held = bytearray(b"x") * (600 << 20)
        time.sleep(5)

def exits(data):
    sys.exit(0)

def fine(data):
    return None

runs = {"crash": crash, "hang": hang, "grow": grow, "exits": exits, "fine": fine}
limit = Limit(8, 100_000, 2, Path(sys.argv[1]))
print("found:", *sorted(fuzz({name: target(run) for name, run in runs.items()}, limit, jobs=5)))
"""

pytestmark = pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris is not installed here (it has wheels for Linux x86_64)"
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.timeout(300)
def test_no_bytes_make_a_parser_fail_in_another_way_than_its_own() -> None:
    done = run("-m", "tests.fuzz", "--seconds", "2", "--runs", "5000", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: none" in done.stdout


def test_fuzzer_notices_crash_hang_growth_and_exit(tmp_path: Path) -> None:
    done = run("-c", BROKEN, str(tmp_path))
    assert "found: crash exits grow hang\n" in done.stdout, done.stdout + done.stderr
    assert [f.read_bytes()[:2] for f in tmp_path.glob("crash-crash-*")] == [b"cr"], "the input is kept"
