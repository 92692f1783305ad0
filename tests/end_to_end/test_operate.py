"""docs/operate.md as an operator follows it: its commands against the live service, and what it says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attestation.operator_state import KeyFile
from tests.demo.processes import ROOT
from tests.demo.stack import Stack
from tests.end_to_end.page import commands
from tests.end_to_end.shell import Shell

PAGE = ROOT / "docs/operate.md"

engine = pytest.mark.engine


@engine
@pytest.mark.timeout(420)
def test_operator_gets_from_a_secret_to_a_bill(shell: Shell, live_stack: Stack, tmp_path: Path) -> None:
    secret, project, unlock = commands("operate", PAGE)
    done = shell.run(secret, PLACE=str(tmp_path))
    assert done.returncode == 0 and re.search(r'bootstrap-sha256 = "[0-9a-f]{64}"', done.stdout), done.stderr

    done = shell.run(project, PLACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    key = (tmp_path / "api-key").read_text().strip()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
    assert "accepted: " in done.stderr and "num_model_requests" in done.stderr and "'amount'" in done.stderr
    assert "log: api_key.created" in done.stderr and key not in done.stderr
    other = shell.run(project, PLACE=str(tmp_path), VOUCHSAFE_ADMIN_KEY=key)  # opens nothing
    assert other.returncode != 0

    file = live_stack.provisioned.directory / "state.key"
    before = KeyFile.decode(file.read_bytes()).checkpoint
    done = shell.run(unlock, PLACE=str(tmp_path))
    assert done.returncode == 0 and "the state is open" in done.stdout, done.stderr
    assert KeyFile.decode(file.read_bytes()).checkpoint.seq > before.seq


def test_every_code_on_the_page_is_one_of_the_programs() -> None:
    source = "\n".join(p.read_text() for zone in ("attestation", "enclave") for p in (ROOT / zone).rglob("*.py"))
    named = set(re.findall(r"`([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)`", PAGE.read_text()))
    assert len(named) > 8
    assert {code for code in named if f'"{code}"' not in source} == set()


def test_every_hint_that_names_a_playbook_finds_it() -> None:
    titles = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert {"Key compromise", "TCB recovery", "GPU attestation failure", "Engine loop", "Rollback suspected"} <= set(
        titles
    )
    for playbook in re.split(r"^## ", PAGE.read_text().partition("# Playbooks")[2], flags=re.MULTILINE)[1:]:
        assert len(playbook.splitlines()) < 60, "a playbook is one page"
