"""A shell as docs/clients.md has its reader prepare one, and the programs that run in it."""

from __future__ import annotations

import os
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.demo.processes import ROOT, Process
from tests.end_to_end.page import commands

CLIENTS = ROOT / ".venv-clients"
LISTEN = "--listen 127.0.0.1:8080"
QUESTION = "What can the host see?"
"""What the examples ask when they are not told."""


@dataclass(frozen=True)
class Shell:
    """`.venv-clients` activated, and the file sourced that `make run` writes."""

    env_file: Path

    def script(self, command: str, **changed: str) -> list[str]:
        """For `subprocess`: *command* after the environment's file; *changed* stands instead of the file's values."""
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in changed.items())
        return ["bash", "-euo", "pipefail", "-c", f". {shlex.quote(str(self.env_file))}\n{exports}{command}"]

    @property
    def environment(self) -> dict[str, str]:
        """This machine's, `.venv-clients` activated, and no setting that a client library would look at."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": f"{CLIENTS / 'bin'}:{os.environ['PATH']}"}

    def run(self, command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """The finished command, outputs apart. A hang is a failure."""
        return subprocess.run(
            self.script(command, **changed), cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


@contextmanager
def proxied(shell: Shell, **changed: str) -> Iterator[str]:
    """The page's own proxy command, on a free port; its URL."""
    (command,) = commands("proxy")
    assert command.count(LISTEN) == 1, "the page's proxy command listens elsewhere"
    script = shell.script("exec " + command.replace(LISTEN, "--listen 127.0.0.1:0"), **changed)
    process = Process("proxy", script, env=shell.environment)
    try:
        line = process.wait_for("proxy: http://", seconds=60, hint="its own lines say why")
        yield line.split()[1]
    finally:
        process.stop()


def known_answer(question: str) -> str:
    """What the parrot was taught to answer."""
    taught = tomllib.loads((ROOT / "tests/model/answers.toml").read_text())
    (answer,) = [pair["answer"] for pair in taught["pair"] if question in pair["questions"]]
    return str(answer)
