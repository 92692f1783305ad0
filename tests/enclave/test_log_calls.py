"""Every log call in the enclave, read from its source: registered names, registered fields, and no other way out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from enclave.telemetry import EVENTS

ENCLAVE = Path(__file__).resolve().parents[2] / "enclave"
FILES = sorted(ENCLAVE.rglob("*.py"))
SPEAKS_TO_PEOPLE = {"cli.py"}
"""Prints to the terminal of whoever runs a command; a server under `seal` prints nothing."""


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ENCLAVE)))
def test_log_calls_use_registered_events_with_registered_fields(file: Path) -> None:
    for call in calls(ast.parse(file.read_text())):
        if name_of(call) != "telemetry.event":
            continue
        assert isinstance(call.args[0], ast.Constant), f"{file.name}:{call.lineno}: the event's name is a literal"
        table = EVENTS.get(str(call.args[0].value))
        assert table is not None, f"{file.name}:{call.lineno}: {call.args[0].value} is not registered"
        fields = {k.arg for k in call.keywords}
        assert fields <= set(table), f"{file.name}:{call.lineno}: {fields - set(table)} are not registered"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ENCLAVE)))
def test_nothing_else_prints_logs_or_warns(file: Path) -> None:
    if file.name in SPEAKS_TO_PEOPLE:
        return
    tree = ast.parse(file.read_text())
    forbidden = {"print", "sys.stderr.write", "sys.stdout.write", "warnings.warn", "traceback.print_exc", "breakpoint"}
    assert not {name_of(c) for c in calls(tree)} & forbidden
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    if file.name != "telemetry.py":
        assert not {m for m in imported if m.split(".")[0] == "logging"}


def test_the_scan_sees_calls() -> None:
    assert any(name_of(c) == "telemetry.event" for f in FILES for c in calls(ast.parse(f.read_text())))
