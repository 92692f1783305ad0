"""Children are found and ended by pid, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from enclave.engine import processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def started(line: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


async def test_child_that_does_not_end_is_killed_by_pid() -> None:
    before = processes.descendants()
    process = started(STUBBORN)
    mine = {pid: start for pid, start in processes.descendants().items() if pid not in before}
    assert list(mine) == [process.pid]
    assert await processes.end(mine, patience=0.1) == 1
    assert process.wait(5) == -signal.SIGKILL
    assert not processes.alive(mine)


async def test_child_that_has_ended_is_not_killed_and_its_pid_is_not_taken_for_it() -> None:
    process = started(SLEEP)
    try:
        assert processes.alive({process.pid: "1"}) == {}, "another process under that pid is not ours"
        assert await processes.end({process.pid: "1"}, patience=0.1) == 0
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(5)


def test_child_ends_when_its_parent_is_killed() -> None:
    """The second layer for an engine core whose front is killed outright: it must not stay behind with plaintext."""
    child = (
        "import os, time; from enclave.engine.child import handler; handler();"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time; os.environ['VOUCHSAFE_ENGINE_FRONT'] = str(os.getpid());"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    start = processes.descendants()[pid]
    process.kill()
    process.wait(5)
    process.stdout.close()
    for _ in range(50):
        if not processes.alive({pid: start}):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the child outlived its parent")


def test_front_does_not_tie_itself_to_its_own_parent() -> None:
    line = (
        "import os; os.environ['VOUCHSAFE_ENGINE_FRONT'] = str(os.getpid());"
        "from enclave.engine.child import handler; handler();"
        "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n), 0, 0, 0); print(n.value)"
    )
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, check=True).stdout == b"0\n"
