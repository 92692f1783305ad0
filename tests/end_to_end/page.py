"""docs/clients.md as the tests read it: the commands it tells people to type, and the outputs it shows."""

from __future__ import annotations

import re
from pathlib import Path

from tests.demo.processes import ROOT

PAGE = ROOT / "docs/clients.md"
EXAMPLES = ROOT / "docs/examples"
_BLOCK = re.compile(r"^<!-- (?P<mark>[a-z][a-z ]*) -->\n```[a-z]+\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(mark: str, page: Path = PAGE) -> list[str]:
    """The fenced blocks under `<!-- mark -->`."""
    return [found["body"] for found in _BLOCK.finditer(page.read_text(encoding="utf-8")) if found["mark"] == mark]


def commands(mark: str, page: Path = PAGE) -> list[str]:
    """Every command of the blocks under `<!-- mark -->`, lines that end in a backslash joined."""
    lines = "\n".join(blocks(mark, page)).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def program(command: str) -> str:
    """The file of docs/examples that *command* runs."""
    found = re.search(r"docs/examples/([A-Za-z0-9_.]+)", command)
    assert found, f"this command of docs/clients.md runs no example: {command}"
    return found[1]
