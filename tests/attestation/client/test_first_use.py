"""Trust on first use: `vouchsafe verify TARGET --first-use FILE`, the real command against real evidence over real TLS.

It shows who a service says it is, compares, explains a change and asks; it never satisfies a policy.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attestation.bundle import Bundle
from attestation.claims import ModelClaim
from attestation.client.cli import main
from attestation.dsse import key_id, public_bytes
from tests.attestation.client.enclave import CHAT, FETCH, PROVE, served, show
from tests.attestation.client.ratls_server import Server, answer
from tests.devtee.tee import DevTee
from tests.genuine import NAME, Genuine, any_reason, genuine, gpu_serial, machine, operator_key
from tests.lies import other_kernel

ORIGIN = f"https://{NAME}"
WORDS = "explored, not appraised: deployment"
UNPINNED = {"deployment": any_reason("exploring: nobody is pinned"), "release": any_reason("exploring: no manifest")}


def today() -> int:
    """Of the hour that the command, which has no other clock than the machine's, is run in."""
    return int(time.time()) // 600 * 600 - 60


@pytest.fixture(autouse=True)
def _nobody_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def told(**changes: Any) -> Genuine:
    """An enclave of today, and a development policy that pins nobody."""
    policy = {**UNPINNED, **changes.pop("policy", {})}
    return genuine(**{"issued_at": today(), "now": int(time.time()), **changes, "policy": policy})


class Explorer:
    """The command as a user types it, for one service and one FILE."""

    def __init__(self, folder: Path, server: Server, story: Genuine) -> None:
        self.file, self._policy, self._server = folder / "first-use.json", folder / "policy.toml", server
        self._policy.write_text(story.policy_text)

    def command(self, *more: str) -> list[str]:
        dial = ["--connect", f"127.0.0.1:{self._server.port}", "--policy", str(self._policy)]
        return ["verify", ORIGIN, *dial, "--first-use", str(self.file), *more]

    def run(self, *more: str) -> int:
        return main(self.command(*more))

    def on_a_terminal(self, typed: bytes, *more: str) -> tuple[int, str]:
        """Exit status and all that a terminal shows; *typed* once the question stands there."""
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "attestation.client.cli", *self.command(*more)]
        try:
            with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
                os.close(theirs)
                seen, asked = b"", False
                while True:
                    try:
                        piece = os.read(ours, 65536)
                    except OSError:  # EIO: the other end is closed
                        break
                    if not piece:
                        break
                    seen += piece
                    if b"[y/N]" in seen and not asked:
                        asked = True
                        os.write(ours, typed)
                return process.wait(30), seen.decode().replace("\r\n", "\n")
        finally:
            os.close(ours)

    @property
    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())["services"][ORIGIN]
        return found


def exploring(folder: Path, story: Genuine, then: Callable[[Explorer, Server], None]) -> None:
    with served(story) as server:
        then(Explorer(folder, server, story), server)


# --- the first time ---


def test_first_use_shows_who_it_says_it_is_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = told()

    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes") == 0
        out = capsys.readouterr().out
        first = out.splitlines()[0]
        assert first.startswith("EXPLORED") and WORDS in first and "DEVELOPMENT" in first and "ACCEPTED" not in out
        assert "operator, release, configuration, names and models are in its own words" in out
        assert "deployment: not appraised" in out
        facts = machine().facts
        shown = [
            "Example Operator", f"key {key_id(public_bytes(operator_key()))}", story.claims.release.hex(), "2026.11.2",
            story.claims.config.hex(), NAME, "parrot", f"piid:{facts.piid.hex()}", gpu_serial(machine(), 0).hex(),
        ]  # fmt: skip
        assert [s for s in shown if s not in out] == []
        assert explorer.row["operator"] == shown[:2] and explorer.row["platform"] == [shown[7]]
        assert explorer.row["first"] == explorer.row["since"] and abs(explorer.row["first"] - time.time()) < 60
        assert set(server.requests) == {FETCH, PROVE}

    exploring(tmp_path, story, then)


def test_file_is_the_users_alone_and_replaced_in_one_step(tmp_path: Path) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        before = os.umask(0)
        try:
            assert explorer.run("--yes") == 0
        finally:
            os.umask(before)
        assert stat.S_IMODE(explorer.file.stat().st_mode) == 0o600
        assert sorted(p.name for p in tmp_path.iterdir()) == ["first-use.json", "policy.toml"]

    exploring(tmp_path, told(), then)


def test_without_a_terminal_the_first_use_needs_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run() == 2
        captured = capsys.readouterr()
        assert "INPUT_FIRST_USE" in captured.err and "--yes" in captured.err and captured.out == ""
        assert not explorer.file.exists() and server.connections == []

    exploring(tmp_path, told(), then)


@pytest.mark.parametrize("typed", [b"y\n", b"YES\n"])
def test_on_a_terminal_a_yes_records_it(tmp_path: Path, typed: bytes) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        status, seen = explorer.on_a_terminal(typed)
        assert status == 0 and "Record this as the service you meant? [y/N]" in seen and "recorded in" in seen
        assert seen.index("Example Operator") < seen.index("[y/N]")
        assert explorer.row["names"] == [NAME]

    exploring(tmp_path, told(), then)


@pytest.mark.parametrize("typed", [b"\n", b"n\n", b"yess\n", b"\x04"], ids=["enter", "n", "a typo", "end of input"])
def test_anything_but_a_yes_records_nothing(tmp_path: Path, typed: bytes) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        status, seen = explorer.on_a_terminal(typed)
        assert status == 1 and "FIRST_USE_DECLINED" in seen and not explorer.file.exists()

    exploring(tmp_path, told(), then)


def test_refused_platform_is_a_refusal_and_nothing_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes") == 1
        out = capsys.readouterr().out
        assert out.startswith("REFUSED") and "TDX_ATTRIBUTES" in out and "EXPLORED" not in out
        assert not explorer.file.exists()

    exploring(tmp_path, told(td={"td_attributes": 0x10000001}), then)


def test_relay_cannot_bring_the_channel_proof_here_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that asks for no proof still gets one: a record must not be of a relay."""
    from tests.attestation.client.enclave import prove

    story = told(policy={"channel.proof": any_reason("exploring")})

    def then(explorer: Explorer, server: Server) -> None:
        server.routes[PROVE] = lambda c, body: prove(story, c, body, signed_exporter=b"\x07" * 32)
        assert explorer.run("--yes") == 1
        assert "CHANNEL_REPORT_DATA" in capsys.readouterr().out and not explorer.file.exists()

    exploring(tmp_path, story, then)


def test_built_in_policy_knows_no_development_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(told()) as server:
        ask = ["verify", ORIGIN, "--connect", f"127.0.0.1:{server.port}", "--first-use", str(tmp_path / "f"), "--yes"]
        assert main(ask) == 1
        assert capsys.readouterr().out.startswith("REFUSED")
        assert not (tmp_path / "f").exists()


# --- later ---


def test_unchanged_service_is_told_since_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes") == 0
        raw = json.loads(explorer.file.read_text())
        raw["services"][ORIGIN] |= {"first": 1_700_000_000, "since": 1_710_000_000}
        explorer.file.write_text(json.dumps(raw))
        capsys.readouterr()
        assert explorer.run() == 0, "nobody needs to be asked"
        out = capsys.readouterr().out
        assert out.startswith("EXPLORED") and "unchanged since 2024-03-09T16:00:00Z" in out
        assert "first met 2023-11-14T22:13:20Z" in out
        assert json.loads(explorer.file.read_text()) == raw

    exploring(tmp_path, told(), then)


OTHER = "spare.vouchsafe.test"
CHANGES: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]]]] = {
    "operator name": ({"statement": {"operator": "Mallory"}}, {"operator": ("Example Operator", "Mallory")}),
    "operator key": (
        {"statement_keys": (9,)},
        {"operator": (key_id(public_bytes(operator_key(0))), key_id(public_bytes(operator_key(9))))},
    ),
    "no operator": ({"statement": None}, {"operator": ("Example Operator", "none")}),
    "release": ({"manifest": {"version": "2026.12.0"}}, {"release": ("2026.11.2", "2026.12.0")}),
    "configuration": ({"config": b"\x05" * 32}, {"configuration": ("sha256:", "05" * 32)}),
    "another image of the same release": (
        {"machine_edit": other_kernel, "manifest": {"rtmrs": [[r] for r in DevTee(machine()).td.rtmr[:3]]}},
        {"measurements": ("rtmr1 ", "rtmr1 ")},
    ),
    "names": ({"names": (NAME, OTHER)}, {"names": (NAME, OTHER)}),
    "weights": ({"models": (ModelClaim("parrot", "sha256:" + "77" * 32),)}, {"models": ("parrot", "77" * 32)}),
    "devices": (
        {"gpus": (1,)}, {"devices": (gpu_serial(machine(), 0).hex(), gpu_serial(machine(), 1).hex())},
    ),
    "platform and roots": (
        {"machine": 1},
        {
            "platform": (machine().facts.piid.hex(), machine(1).facts.piid.hex()),
            "devices": (gpu_serial(machine(), 0).hex(), gpu_serial(machine(1), 0).hex()),
            "roots": ("Intel SGX Root CA", "Intel SGX Root CA"),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_change_is_explained_aspect_by_aspect_and_refused_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lie: dict[str, Any], expected: dict[str, tuple[str, str]]
) -> None:
    first, second = told(), told(**lie)
    with served(first) as server:
        assert Explorer(tmp_path, server, first).run("--yes") == 0
        show(server, second)
        explorer = Explorer(tmp_path, server, second)
        before = explorer.file.read_bytes()
        capsys.readouterr()
        for more in ([], ["--yes"]):  # a yes given beforehand is for the first time alone
            assert explorer.run("--json", *more) == 1
            document = json.loads(capsys.readouterr().out)
            found = document["explored"]
            assert found["verdict"] == "refused" and found["codes"] == ["FIRST_USE_CHANGED"]
            assert "verdict" not in document
            assert found["changes"].keys() == expected.keys()
            for aspect, (was, now) in expected.items():
                assert was in " ".join(found["changes"][aspect]["was"])
                assert now in (" ".join(found["changes"][aspect]["now"]) or "none")
        assert explorer.run("--yes") == 1
        captured = capsys.readouterr()
        assert captured.out.startswith("CHANGED since ") and "FIRST_USE_CHANGED" in captured.err
        for aspect, (was, now) in expected.items():
            assert aspect in captured.err and was in captured.out and now in captured.out
        assert explorer.file.read_bytes() == before


@pytest.mark.parametrize(("typed", "taken"), [(b"y\n", True), (b"\n", False), (b"\x04", False)])
def test_on_a_terminal_a_change_is_asked_about_and_no_is_the_default(tmp_path: Path, typed: bytes, taken: bool) -> None:
    first, second = told(), told(statement={"operator": "Mallory"})
    with served(first) as server:
        explorer = Explorer(tmp_path, server, first)
        assert explorer.run("--yes") == 0
        raw = json.loads(explorer.file.read_text())
        raw["services"][ORIGIN]["first"] = met = 1_700_000_000
        explorer.file.write_text(json.dumps(raw))
        show(server, second)
        status, seen = explorer.on_a_terminal(typed, "--yes")
        assert seen.index("Mallory") < seen.index("Changed: operator. Is it still the service you meant? [y/N]")
        assert status == (0 if taken else 1) and ("FIRST_USE_CHANGED" in seen) != taken
        assert (explorer.row["operator"][0] == "Mallory") == taken and explorer.row["first"] == met


class _Typed(io.StringIO):
    """Text that comes from a terminal, or does not."""

    def __init__(self, text: str, terminal: bool) -> None:
        super().__init__(text)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(("typing", "reading"), [(False, False), (False, True), (True, False), (True, True)])
def test_an_answer_counts_only_from_somebody_who_can_read_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typing: bool, reading: bool
) -> None:
    """`yes | vouchsafe …` is nobody's answer."""
    first, second = told(), told(statement={"operator": "Mallory"})
    with served(first) as server:
        explorer = Explorer(tmp_path, server, first)
        assert explorer.run("--yes") == 0
        show(server, second)
        monkeypatch.setattr(sys, "stdin", _Typed("y\n", typing))
        monkeypatch.setattr(sys, "stderr", _Typed("", reading))
        assert explorer.run() == (0 if typing and reading else 1)


def test_several_services_share_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = told(names=(NAME, OTHER)), told(names=(OTHER,))
    with served(one) as server, served(two) as other:
        explorer = Explorer(tmp_path, server, one)
        assert explorer.run("--yes") == 0
        command = explorer.command("--yes")
        command[1], command[3] = f"https://{OTHER}:8443", f"127.0.0.1:{other.port}"
        assert main(command) == 0
        assert set(json.loads(explorer.file.read_text())["services"]) == {ORIGIN, f"https://{OTHER}:8443"}
        assert explorer.run() == 0


def test_json_is_one_document_that_nobody_takes_for_an_accepted_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert set(document) == {"subject", "explored", "platform"} and document["subject"] == ORIGIN
        assert document["explored"]["verdict"] == WORDS and document["explored"]["state"] == "new"
        assert document["platform"]["verdict"] == "accepted" and document["platform"]["development"]
        assert document["explored"]["identity"]["names"] == [NAME]
        assert explorer.run("--json") == 0
        assert json.loads(capsys.readouterr().out)["explored"]["state"] == "unchanged"

    exploring(tmp_path, told(), then)


# --- what it is not ---


@pytest.mark.parametrize("release", [{}, {"release": any_reason("exploring: no manifest")}])
def test_policy_that_pins_the_operator_leaves_nothing_to_first_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], release: dict[str, Any]
) -> None:
    story = genuine(issued_at=today(), now=int(time.time()), policy=release)

    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes") == 2
        assert "pins the operator" in capsys.readouterr().err
        assert not explorer.file.exists() and server.connections == []

    exploring(tmp_path, story, then)


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "--target", ORIGIN, "--model", "parrot", "the user's own prompt"], ["models", "--target", ORIGIN],
        ["verify", ORIGIN], ["bundle", ORIGIN, "-o", "unused"], ["proxy", "--to", ORIGIN, "--listen", "127.0.0.1:0"],
        ["verify-quote", "unused", "--collateral", "unused", "--at", "1"],
    ],
    ids=lambda c: c[0],
)  # fmt: skip
def test_record_is_no_policy_for_any_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        assert explorer.run("--yes") == 0
        dialled = len(server.connections)
        capsys.readouterr()
        dial = [] if command[0] == "verify-quote" else ["--connect", f"127.0.0.1:{server.port}"]
        assert main([*command, "--policy", str(explorer.file), *dial]) == 2
        assert "POLICY_FIRST_USE" in capsys.readouterr().err
        assert len(server.connections) == dialled and CHAT not in server.requests

    exploring(tmp_path, told(), then)


@pytest.mark.parametrize("command", ["chat", "models", "proxy", "bundle"])
def test_no_command_that_sends_anything_takes_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "first-use" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["saved.bundle", "--first-use", "f"], "INPUT_USAGE"), ([ORIGIN, "--yes"], "INPUT_USAGE"),
        ([ORIGIN, "--first-use", "f", "--at", "1"], "INPUT_TIME"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_a_usage_error(more: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *more]) == 2
    assert code in capsys.readouterr().err


# --- the file ---

BAD: dict[str, bytes] = {
    "empty": b"", "text": b"hello", "an array": b"[]", "another version": b'{"vouchsafe-first-use": 2, "services": {}}',
    "true": b'{"vouchsafe-first-use": true, "services": {}}', "no services": b'{"vouchsafe-first-use": 1}',
    "a list of services": b'{"vouchsafe-first-use": 1, "services": []}',
    "twice": b'{"vouchsafe-first-use": 1, "services": {}, "services": {}}',
    "more": b'{"vouchsafe-first-use": 1, "services": {}, "x": 1}', "not UTF-8": b"\xff", "deep": b"[" * 100_000,
    "an empty service": b'{"vouchsafe-first-use": 1, "services": {"https://a.test": {}}}',
    "long": b" " * (1 << 20) + b'{"vouchsafe-first-use": 1, "services": {}}',
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_damaged_file_is_an_error_and_never_a_first_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        explorer.file.write_bytes(content)
        assert explorer.run("--yes") == 2
        assert "INPUT_FIRST_USE" in capsys.readouterr().err
        assert explorer.file.read_bytes() == content and server.connections == []

    exploring(tmp_path, told(), then)


def test_file_that_cannot_be_read_is_not_a_first_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        explorer.file.mkdir()
        assert explorer.run("--yes") == 2
        assert "INPUT_FIRST_USE" in capsys.readouterr().err and server.connections == []

    exploring(tmp_path, told(), then)


def test_file_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def then(explorer: Explorer, server: Server) -> None:
        explorer.file = tmp_path / "missing" / "f"
        assert explorer.run("--yes") == 2
        assert "INPUT_FILE" in capsys.readouterr().err

    exploring(tmp_path, told(), then)


# --- whose words they are ---


def test_documents_in_somebody_elses_place_are_not_shown_as_the_services(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who carries the evidence is not the service: only what the quote commits to may speak for it."""
    story = told()
    other = told(statement={"operator": "Mallory"}, manifest={"version": "9"})
    for member in ("deployment", "release"):
        swapped = dataclasses.replace(story.evidence, **{member: getattr(other.evidence, member)})
        for evidence in (swapped, dataclasses.replace(story.evidence, **{member: b""})):
            with served(story) as server:
                server.routes[FETCH] = answer(Bundle(evidence, story.endorsements).encode())
                explorer = Explorer(tmp_path, server, story)
                assert explorer.run("--yes") == 1
                captured = capsys.readouterr()
                assert "Mallory" not in captured.out + captured.err and not explorer.file.exists()
                assert "EVIDENCE_DIGEST" in captured.err or "FORMAT_DSSE" in captured.err


def test_control_characters_of_a_service_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = told(), told(statement={"operator": "\x1b[2J\x1b]0;x\x07 Honest\nACCEPTED"})
    with served(first) as server:
        assert Explorer(tmp_path, server, first).run("--yes") == 0
        show(server, second)
        assert Explorer(tmp_path, server, second).run() == 1
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err
        assert not any(line.lstrip().startswith("ACCEPTED") for line in captured.out.splitlines())
