"""The door to the log lets registered names, numbers and safe words through, and nothing else."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from enclave import telemetry

CANARY = "the quick canary"


@pytest.fixture(autouse=True)
def fresh() -> None:
    telemetry.dropped.clear()


def lines(capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_registered_event_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    telemetry.event("request", request_id="req_1", status=200, stream=True, code=None)
    (line,) = lines(capfd)
    assert {k: line[k] for k in ("event", "request_id", "status", "stream")} == {
        "event": "request",
        "request_id": "req_1",
        "status": 200,
        "stream": True,
    }
    assert "code" not in line


def test_unregistered_event_is_dropped_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    telemetry.event("prompt", text=CANARY)
    assert lines(capfd) == []
    assert telemetry.dropped == {"event": 1}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("prompt", "x", "field"),
        ("route", CANARY, "value"),
        ("route", "a\nb", "value"),
        ("route", "é", "value"),
        ("route", "a" * 129, "value"),
        ("status", "200", "value"),
        ("status", True, "value"),
        ("status", 2**60, "value"),
        ("stream", 1, "value"),
        ("route", b"x", "value"),
    ],
)
def test_field_that_does_not_fit_is_dropped_and_counted(
    name: str, value: object, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    telemetry.event("request", **{name: value, "ms": 5})  # type: ignore[arg-type]  # wrong on purpose
    (line,) = lines(capfd)
    assert set(line) == {"ts", "event", "ms"}
    assert telemetry.dropped == {reason: 1}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def test_library_record_tells_where_and_never_what() -> None:
    out = run(
        "import logging, warnings\n"
        "from enclave import telemetry\n"
        "logging.getLogger('noisy').addHandler(logging.StreamHandler())\n"
        "telemetry.configure_libraries()\n"
        f"logging.getLogger('noisy').error('{CANARY} %s', '{CANARY}')\n"
        f"warnings.warn('{CANARY}')\n"
        f"try: raise ValueError('{CANARY}')\n"
        f"except ValueError: logging.getLogger('vllm.engine').exception(f'{CANARY}')\n"
        f"logging.getLogger('noisy').info('{CANARY}')\n"
        f"logging.getLogger('bad').error('{CANARY} %d', '{CANARY}')\n"
    )
    assert CANARY not in out
    made = [json.loads(line) for line in out.splitlines()]
    assert [m["logger"] for m in made] == ["noisy", "py.warnings", "vllm.engine", "bad"]
    assert (made[2]["error"], made[2]["level"]) == ("ValueError", "ERROR")


def test_positive_control_the_same_record_without_the_door_is_seen() -> None:
    assert CANARY in run(f"import logging; logging.getLogger('noisy').error('{CANARY}')")


def test_sealed_process_and_its_children_print_nothing_but_our_lines() -> None:
    out = run(
        "import os, subprocess, sys, threading, time\n"
        "from enclave import telemetry\n"
        "telemetry.seal()\n"
        f"print('{CANARY}', flush=True); os.write(2, b'{CANARY}\\n')\n"
        f"subprocess.run([sys.executable, '-c', 'print(\"{CANARY}\")'])\n"
        f'child = \'from enclave import telemetry; telemetry.event("library", logger="child", line=7)\'\n'
        "subprocess.run([sys.executable, '-c', child])\n"
        f'forged = \'{{"ts":1,"event":"request","route":"{CANARY}"}}\'\n'
        "os.write(2, forged.encode() + b'\\n')\n"
        f'half = \'{{"ts":1,"event":"library","logger":"{CANARY}","line":3}}\'\n'
        "os.write(2, half.encode() + b'\\n')\n"
        f"t = threading.Thread(target=lambda: 1 / len(''), name='{CANARY}'); t.start(); t.join()\n"
        "time.sleep(0.3)\n"
        f"raise RuntimeError('{CANARY}')\n"
    )
    assert CANARY not in out
    made = [json.loads(line) for line in out.splitlines()]
    seen = sorted((str(m["event"]), str(m.get("logger")), str(m.get("error"))) for m in made)
    assert seen == [
        ("library", "None", "None"),
        ("library", "child", "None"),
        ("uncaught", "None", "RuntimeError"),
        ("uncaught", "None", "ZeroDivisionError"),
    ]


def test_unseal_gives_the_output_back() -> None:
    out = run(
        "from enclave import telemetry\n"
        "telemetry.seal(); telemetry.seal(); print('inside', flush=True)\n"
        "telemetry.unseal(); telemetry.unseal(); print('outside', flush=True)\n"
        "telemetry.event('boot.ready', ms=1)\n"
    )
    assert "inside" not in out
    assert "outside" in out
    assert "boot.ready" in out


def test_root_has_our_handler_alone_after_taking_over() -> None:
    out = run(
        "import logging\n"
        "from enclave import telemetry\n"
        "logging.basicConfig()\n"
        "telemetry.configure_libraries()\n"
        "print([type(h).__name__ for h in logging.getLogger().handlers])\n"
    )
    assert out.strip() == "['LibraryHandler']"
    assert logging.getLogger("x").name == "x"
