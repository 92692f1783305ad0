"""What a person sees: the verdict first, failures in full, and nothing that drives the terminal."""

from __future__ import annotations

import pytest

from attestation.client.cli import main
from attestation.client.cli_common import moment
from attestation.client.handshake import NotAttested, find
from attestation.client.report import Paint, printable, render
from attestation.client.target import Target, parse_address
from attestation.errors import InputError, RefusedError
from tests.genuine import genuine

PLAIN = Paint(False)


def test_refusal_stands_first_and_names_every_failed_check_with_expected_and_actual() -> None:
    result = genuine(names=("other.test",), name="demo.vouchsafe.test", state={"ready": False}).verify()
    lines = render(result, subject="https://demo.vouchsafe.test", paint=PLAIN).splitlines()
    assert lines[0].startswith("REFUSED  https://demo.vouchsafe.test  DEVELOPMENT")
    failed = "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("checks:"))])
    for check in result.failed:
        assert f"{check.code}: {check.reason}" in failed
    assert "expected demo.vouchsafe.test" in failed and "actual   other.test" in failed


def test_skip_is_counted_as_a_skip_and_not_as_a_pass() -> None:
    result = genuine().verify()
    text = render(result, subject="x", paint=PLAIN)
    skips = sum(c.status == "skip" for c in result.checks)
    assert skips and f"{len(result.checks) - skips} passed, 0 failed, {skips} skipped" in text


def test_colours_are_for_terminals_alone(capsys: pytest.CaptureFixture[str]) -> None:
    result = genuine().verify()
    assert "\x1b" not in render(result, subject="x", paint=PLAIN) and "\x1b[" in render(
        result, subject="x", paint=Paint(True)
    )
    main(["verify", "/dev/null"])
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err


def test_control_characters_of_a_peer_are_not_printed() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\u202ec\n\td") == "a�[2Jb���c\n\td"
    result = genuine(statement={"operator": "Evil\x1b[2J Corp"}).verify()
    assert "\x1b" not in render(result, subject="x", paint=PLAIN)


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("https://demo.vouchsafe.test", "demo.vouchsafe.test", 443),
        ("https://Demo.Vouchsafe.test.:8443/v1/", "demo.vouchsafe.test", 8443),
        ("https://localhost:1/", "localhost", 1),
    ],
)
def test_target_is_read(text: str, name: str, port: int) -> None:
    target = Target.parse(text, ("::1", 2))
    assert (target.name, target.port, target.address) == (name, port, ("::1", 2))


@pytest.mark.parametrize(
    "text",
    [
        "", "demo.test", "http://demo.test", "https://", "https://user@demo.test", "https://demo.test/other",
        "https://demo.test?x", "https://demo.test:0", "https://demo.test:99999", "https://[::1]", "https://10.0.0.1",
        "https://de mo.test", "https://*.test", "https://-a.test", "https://ä.test", "https://" + "a" * 64 + ".test",
    ],
)  # fmt: skip
def test_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="INPUT_TARGET"):
        Target.parse(text)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:70000", "host:1x"])
def test_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="INPUT_ADDRESS"):
        parse_address(text)


def test_addresses_and_times_are_read() -> None:
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80) and parse_address("[::1]:80") == ("::1", 80)
    assert moment("1792714008") == moment("2026-10-23T00:06:48Z") == moment("2026-10-23T02:06:48+02:00") == 1792714008


def test_refusal_is_found_however_a_library_wraps_it() -> None:
    refusal = NotAttested(RefusedError("X", "y"))
    outer = RuntimeError("library")
    outer.__cause__ = ValueError("middle")
    outer.__cause__.__context__ = refusal
    assert find(outer) is refusal and find(ValueError()) is None
    carried = RuntimeError("urllib3")
    carried.reason = refusal  # type: ignore[attr-defined]  # as urllib3 does
    assert find(carried) is refusal
