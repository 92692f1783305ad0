"""Whatever stands where NVIDIA's verifier should: it is shown, it is bounded, and our verdict stays ours.

The real one is asked in `tests/interop`; here shell scripts play an interpreter that hangs, lies or breaks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from attestation.client import cli
from attestation.client.second_opinion import ENVIRONMENT, SecondOpinion, ask, find_python
from attestation.errors import FormatError, InputError
from attestation.policy import BUILT_IN_ROOTS
from tests.attestation.gpu.judge import NONCE, NOW, tee

ENTRY = {"certificate": "", "evidence": "", "arch": "HOPPER"}
ACCEPTED = '{"accepted": true, "missing": [], "said": []}'


def interpreter(tmp_path: Path, script: str) -> Path:
    """Called as `PYTHON -I -B JUDGE JOB ANSWER`: $4 is the job, $5 where the answer goes."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def asked(python: Path, *, accepted: bool = False, switches: int = 0, seconds: float = 20.0) -> SecondOpinion:
    return ask(
        python, [ENTRY], switches=switches, nonce=bytes(32), at=NOW, rims={}, ocsp={}, roots=BUILT_IN_ROOTS,
        accepted=accepted, seconds=seconds,
    )  # fmt: skip


def test_its_acceptance_of_what_we_refused_is_a_disagreement(tmp_path: Path) -> None:
    opinion = asked(interpreter(tmp_path, f"echo '{ACCEPTED}' > $5"), accepted=False)
    assert opinion == SecondOpinion("accepted", False, "")


def test_its_refusal_is_shown_with_its_complaints_in_one_printable_line(tmp_path: Path) -> None:
    answer = json.dumps({"accepted": False, "missing": [], "said": ["bad\x1b[31m\nnonce", "x" * 1000]})
    opinion = asked(interpreter(tmp_path, f"cat > $5 <<'END'\n{answer}\nEND"), accepted=True)
    assert (opinion.verdict, opinion.agrees) == ("refused", False)
    assert opinion.detail.startswith("bad�[31m nonce; xxx") and len(opinion.detail) <= 400


@pytest.mark.parametrize("truthy", ["1", '"yes"', "[0]", "null"])
def test_only_true_is_an_acceptance(tmp_path: Path, truthy: str) -> None:
    script = f'echo \'{{"accepted": {truthy}, "missing": [], "said": []}}\' > $5'
    assert asked(interpreter(tmp_path, script)).verdict == "refused"


def test_what_was_not_given_makes_it_unavailable(tmp_path: Path) -> None:
    script = """echo '{"accepted": false, "missing": ["RIM X"], "said": ["failed"]}' > $5"""
    opinion = asked(interpreter(tmp_path, script))
    assert (opinion.verdict, opinion.agrees) == ("unavailable", None) and "RIM X" in opinion.detail


@pytest.mark.parametrize(
    "script",
    ["exit 0", "exit 3", "echo nonsense > $5", "echo '{}' > $5", "echo [] > $5", "head -c 100000 /dev/zero > $5",
     f"echo '{ACCEPTED}' > $5; exit 1"],
)  # fmt: skip
def test_a_broken_judge_has_no_opinion(tmp_path: Path, script: str) -> None:
    opinion = asked(interpreter(tmp_path, script))
    assert (opinion.verdict, opinion.agrees) == ("unavailable", None) and opinion.detail


def test_a_judge_that_hangs_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}; wait"
    started = time.monotonic()
    opinion = asked(interpreter(tmp_path, script), seconds=1.0)
    assert opinion.verdict == "unavailable" and "within 1 s" in opinion.detail
    assert time.monotonic() - started < 15
    for pid in pids.read_text().split():
        _gone(int(pid))


def _gone(pid: int) -> None:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_it_inherits_nothing_and_works_in_an_empty_directory_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NV_ALLOW_HOLD_CERT", "true")
    monkeypatch.setenv("SECRET", "not for it")
    seen = tmp_path / "seen"
    asked(interpreter(tmp_path, f"{{ env; pwd; ls; }} > {seen}; echo noise; echo '{ACCEPTED}' > $5"))
    text = seen.read_text()
    assert "NV_" not in text and "SECRET" not in text
    work = next(Path(line) for line in text.splitlines() if line.startswith("/") and line.endswith("/work"))
    assert text.rstrip().endswith(str(work)), "the working directory is empty"
    assert not work.exists()


def test_switches_are_said_not_to_be_judged(tmp_path: Path) -> None:
    python = interpreter(tmp_path, f"echo '{ACCEPTED}' > $5")
    assert asked(python, accepted=True, switches=4) == SecondOpinion("accepted", True, "4 switches not judged")
    alone = ask(
        python, [], switches=1, nonce=bytes(32), at=NOW, rims={}, ocsp={}, roots=BUILT_IN_ROOTS, accepted=True
    )  # fmt: skip
    assert (alone.verdict, alone.agrees) == ("unavailable", None)


def test_entries_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="FORMAT_GPU_JSON"):
        ask(
            tmp_path, [1], switches=0, nonce=bytes(32), at=NOW, rims={}, ocsp={}, roots=BUILT_IN_ROOTS, accepted=False
        )  # fmt: skip


def test_environment_is_found_by_option_then_variable_then_beside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(InputError, match="INPUT_SECOND_OPINION"):
        find_python(None)
    beside = tmp_path / ".venv-nvidia" / "bin"
    beside.mkdir(parents=True)
    (beside / "python").symlink_to(sys.executable)
    assert find_python(None) == beside / "python"
    monkeypatch.setenv(ENVIRONMENT, sys.executable)
    assert find_python(None) == Path(sys.executable)
    named = interpreter(tmp_path, "exit 0")
    assert find_python(str(named)) == named


def command(tmp_path: Path, *arguments: str) -> list[str]:
    (tmp_path / "evidence.json").write_text(json.dumps(tee().gpu_evidence(NONCE, [0])))
    root = tmp_path / "root.pem"
    root.write_bytes(tee().roots_pem["nvidia_device"])
    return [
        "verify-gpu", str(tmp_path / "evidence.json"), "--nonce", NONCE.hex(), "--at", str(NOW), "--root", str(root),
        *arguments,
    ]  # fmt: skip


def test_command_stays_refused_though_the_other_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, f"echo '{ACCEPTED}' > $5")
    asks = command(tmp_path, "--second-opinion", "--nvidia-python", str(python))
    assert cli.main(asks) == 1
    text = capsys.readouterr().out
    assert text.startswith("REFUSED") and "second opinion  DISAGREES: accepted" in text
    assert cli.main([*asks, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "refused" and said["second_opinion"]["agrees"] is False


def test_command_stays_accepted_though_the_other_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, """echo '{"accepted": false, "missing": [], "said": ["no"]}' > $5""")
    stages = "parse,nonce,signature,chain,fwid"
    asks = command(tmp_path, "--require", stages, "--second-opinion", "--nvidia-python", str(python))
    assert cli.main(asks) == 0
    text = capsys.readouterr().out
    assert text.startswith("ACCEPTED") and "second opinion  DISAGREES: refused" in text


def test_without_its_environment_the_command_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    absent = os.fspath(tmp_path / "absent")
    assert cli.main(command(tmp_path, "--second-opinion", "--nvidia-python", absent)) == 2
    assert "INPUT_SECOND_OPINION" in (told := capsys.readouterr().err) and "hint: tests/interop/setup" in told
    assert cli.main(["verify-gpu", "--batch", "-", "--second-opinion"]) == 2


def test_without_being_asked_nobody_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, f"touch {tmp_path}/called")
    cli.main(command(tmp_path, "--nvidia-python", str(python), "--json"))
    assert "second_opinion" not in json.loads(capsys.readouterr().out)
    assert not (tmp_path / "called").exists()
