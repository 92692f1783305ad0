"""The demo's own tools: a search that can find, processes that end, a transcript that notices a change."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.demo.__main__ import main
from tests.demo.processes import PYTHON, Failed, Process
from tests.demo.refusals import edited_receipt
from tests.demo.search import found
from tests.demo.stack import undisturbed
from tests.demo.transcript import abridged, normal


def stream(*parts: str) -> bytes:
    """An SSE body as it crosses HTTP, chunk sizes included."""
    body = b""
    for part in parts:
        event = b"data: " + json.dumps({"choices": [{"delta": {"content": part}}]}).encode() + b"\n\n"
        body += b"%x\r\n%s\r\n" % (len(event), event)
    return body


@pytest.mark.parametrize("text", ["What can the host see?", 'She said "no"', "naïve ⟂ text"])
def test_search_finds_text_raw_in_json_and_spread_over_deltas(text: str) -> None:
    assert found(b"noise" + text.encode() + b"noise", text)
    assert found(json.dumps({"content": text}).encode(), text)
    assert found(b"HTTP/1.1 200 OK\r\n\r\n" + stream(*text), text)


def test_search_does_not_find_what_is_not_there() -> None:
    assert not found(stream("some", "thing"), "another")
    assert not found(bytes(range(256)) * 100, "What can the host see?")


def test_process_that_dies_at_once_is_a_failure_with_its_last_words() -> None:
    process = Process("short", [PYTHON, "-c", "print('no luck'); raise SystemExit(7)"])
    with pytest.raises(Failed, match=r"status 7.*no luck"):
        process.wait_for("ready", seconds=30, hint="")
    assert process.stop() == 7


def test_stopped_process_takes_its_children_along() -> None:
    code = "import subprocess,sys,time; subprocess.Popen([sys.executable,'-c','import time; time.sleep(60)']); "
    process = Process("parent", [PYTHON, "-c", code + "print('ready'); time.sleep(60)"])
    process.wait_for("ready", seconds=30, hint="")
    assert len(process.group()) == 2
    process.stop()
    deadline = time.monotonic() + 5
    while process.group() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.group() == []


def test_transcript_ignores_digests_and_times_and_notices_words() -> None:
    one = "boot 4/11 weights: ok (0.1 s) 0123456789abcdef…\n"
    assert normal(one) == normal("boot 4/11 weights: ok (3.4 s) fedcba9876543210…\n")
    assert normal(one) != normal("boot 4/11 weights: FAILED (0.1 s) 0123456789abcdef…\n")


def test_transcript_shortens_runs_of_passes_and_keeps_every_failure() -> None:
    text = "\n".join([*(f"  pass  a{i}" for i in range(9)), "  fail  b", "  pass  c"])
    assert abridged(text).splitlines() == [
        "  pass  a0", "  pass  a1", "  … 5 more passed", "  pass  a7", "  pass  a8", "  fail  b", "  pass  c",
    ]  # fmt: skip


def test_edited_receipt_differs_in_one_number(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"served_at":1750000000,"model":"m"}')
    assert edited_receipt(tmp_path / "r.json", tmp_path).read_text() == '{"served_at":1750000001,"model":"m"}'


def test_missing_model_names_the_stage_and_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--keep"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("\nerror: stage start: model:") and "hint: MODEL=DIR" in error


def test_second_interrupt_does_not_stop_the_clean_up() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
