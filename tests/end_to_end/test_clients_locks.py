"""What `make clients` installs is pinned by hash, and holds what our own `[client]` extra asks for."""

from __future__ import annotations

import json
import re
import tomllib

from tests.demo.processes import ROOT

LOCKS = ROOT / "images/locks"


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].split() for line in (LOCKS / name).read_text().splitlines()]
    return {normal(line[0].split("==")[0]): line[0].split("==")[1] for line in lines if line}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_pinned_by_hash_and_the_two_files_agree() -> None:
    text = (LOCKS / "clients-py311.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.match(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}( |$)", line) for line in lines)
    assert pins("clients-py311.txt") == pins("clients-py311.in")


def test_lock_holds_the_client_extra_and_agrees_with_the_other_lock() -> None:
    locked, other = pins("clients-py311.txt"), pins("cpu-py311.txt")
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["client"]
    asked = {normal(name): version for name, version in (requirement.split("==") for requirement in extra)}
    assert {name: locked.get(name) for name in asked} == asked
    assert {n: v for n, v in locked.items() if n in other and other[n] != v} == {}


def test_npm_packages_are_exact_and_locked_by_integrity_without_a_registry() -> None:
    package = json.loads((LOCKS / "node/package.json").read_text())
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package["dependencies"].values())
    raw = (LOCKS / "node/package-lock.json").read_text()
    assert "resolved" not in raw
    packages = json.loads(raw)["packages"]
    assert packages.pop("")["dependencies"] == package["dependencies"]
    assert packages and all(entry["integrity"].startswith("sha512-") for entry in packages.values())
