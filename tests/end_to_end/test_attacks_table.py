"""The table of attacks in docs/threat-model.md is what the tests do: every row has its test, every test its row."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE.parents[1] / "docs/threat-model.md"


def sources() -> dict[str, str]:
    """Name → source, of every test of an attack."""
    found = {}
    for path in sorted(HERE.glob("test_attacks_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = ast.get_source_segment(text, node) or ""
    return found


def rows() -> list[tuple[str, ...]]:
    """Attack, defence, code, test of each row."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Attacks on the channel\n")[1].split("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert cells[0] == ("attack", "defence", "code", "test")
    return cells[1:]


def test_every_row_names_a_test_that_gives_its_codes() -> None:
    found = sources()
    for row in rows():
        assert len(row) == 4 and all(row), row
        name = row[3].strip("`")
        assert name in found, f"no such test: {name}"
        codes = re.findall(r"[A-Z][A-Z0-9_]{3,}|\d{3}", row[2])
        assert codes, row
        for code in codes:
            assert code in found[name], f"{name} does not give {code}"


def test_every_attack_that_is_run_twice_stands_in_the_table() -> None:
    told = [row[3].strip("`") for row in rows()]
    assert len(told) == len(set(told)), "a test stands twice"
    attacks = {name for name, source in sources().items() if re.search(r"\bstops\(", source)}
    assert len(attacks) > 25 and attacks <= set(told), attacks - set(told)
