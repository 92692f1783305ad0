"""What a process does for its own secrecy, proven in a process that did it; and how `check` tells what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attestation.errors import InputError
from enclave import hardening
from enclave.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, resource, ctypes
from enclave import hardening
hardening.apply()
bad = [m.id for m in hardening.check() if m.status == "fail" and m.essential]
libc = ctypes.CDLL(None)
print(bad, resource.getrlimit(resource.RLIMIT_CORE), libc.prctl(3, 0, 0, 0, 0), oct(os.umask(0)))
"""


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin", **(env or {})},
    )  # fmt: skip


def test_process_has_no_core_dump_no_ptrace_and_private_files() -> None:
    assert run("-c", SCRIPT).stdout.strip() == "[] (0, 0) 0 0o77"


def test_measures_that_were_not_applied_are_seen_as_missing() -> None:
    """`check` reads the kernel's answer, not our intention."""
    script = SCRIPT.replace("hardening.apply()\n", "resource.setrlimit(resource.RLIMIT_CORE, (1, 1)); os.umask(0)\n")
    missing = run("-c", script).stdout
    for id in ("core-limit", "dumpable", "no-new-privileges", "subreaper", "umask"):
        assert f"'{id}'" in missing


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP", "SSLKEYLOGFILE"])
def test_variables_that_inject_code_or_carry_keys_out_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name) as refused:
        hardening.refuse_environment({name: "", "PATH": "/bin"})
    assert f"env -u {name}" in refused.value.hint
    assert [m.status for m in hardening.check({name: "x"}) if m.id == "environment"] == ["fail"]
    hardening.refuse_environment({"PATH": "/bin", "LD_LIBRARY_PATH": "/x"})


@pytest.mark.parametrize(
    ("file", "content", "id", "status"),
    [
        ("swaps", "Filename\n", "swap", "pass"),
        ("swaps", "Filename\n/dev/sda2 partition\n", "swap", "fail"),
        ("sys/kernel/core_pattern", "core\n", "core-pattern", "pass"),
        ("sys/kernel/core_pattern", "|/bin/false\n", "core-pattern", "pass"),
        ("sys/kernel/core_pattern", "|/usr/bin/collect %p\n", "core-pattern", "fail"),
        ("sys/kernel/yama/ptrace_scope", "0\n", "ptrace-scope", "fail"),
        ("sys/kernel/yama/ptrace_scope", "2\n", "ptrace-scope", "pass"),
        ("nothing", "", "swap", "skip"),
        ("cpuinfo", "flags: fpu tdx_guest\n", "tdx-guest", "pass"),
    ],
)
def test_machine_is_looked_at(tmp_path: Path, file: str, content: str, id: str, status: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    assert [m.status for m in hardening.check({}, proc=tmp_path) if m.id == id] == [status]


def test_check_prints_the_verdict_first_and_json_on_request() -> None:
    shown = run("-m", "enclave.cli", "check")
    assert shown.stdout.startswith("hardening: ") and "core-limit" in shown.stdout
    document = json.loads(run("-m", "enclave.cli", "check", "--json").stdout)
    assert document["holds"] is (shown.returncode == 0)
    assert {m["status"] for m in document["measures"]} <= {"pass", "fail", "skip"}
    bad = run("-m", "enclave.cli", "check", env={"LD_LIBRARY_PATH": "/x"})
    assert bad.returncode == 1 and "fail  library-path" in bad.stdout


def test_usage_and_missing_configuration_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["serve"], ["dance"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    done = run("-m", "enclave.cli", "serve", "--config", "/nowhere.toml")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "boot 1/12 configuration: FAILED: INPUT_CONFIG_READ" in done.stdout and "hint: " in done.stdout
