"""`vouchsafe verify-quote` and `verify-gpu` on real evidence, singly and in batches; bad input is one clear line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from attestation.client.cli import main
from tests.vectors import VECTORS, cases, need_vectors

QUOTES = [p for p in cases("tdx") if (p / "quote.bin").exists()]
GPUS = [p for p in cases("gpu") if (p / "case.json").exists()]
GOOD = VECTORS / "tdx" / "bb7c69487f-eval20"
GPU = VECTORS / "gpu" / "h100-550.90.07-full"


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def quote_case(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "case.json").read_text())
    case = {
        "id": about["id"],
        "quote": b64((folder / "quote.bin").read_bytes()),
        "collateral": json.loads((folder / "collateral.json").read_text()),
        "at": about["at"],
        "min_tcb_evaluation": about["eval_floor"],
    }
    for name, key in (("ccel.bin", "event_log"), ("eventlog.json", "event_log"), ("root.der", "root")):
        if (folder / name).exists():
            case[key] = b64((folder / name).read_bytes())
    return case


def gpu_case(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "case.json").read_text())

    def evidence(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else []

    def files(name: str) -> dict[str, str]:
        return {p.stem: b64(p.read_bytes()) for p in sorted((folder / name).glob("*.*"))}

    return {
        "id": about["id"], "evidence": evidence("evidence.json"), "switches": evidence("switches.json"),
        "nonce": about["nonce"], "at": about["at"], "mode": about["mode"], "count": about["count"],
        "require": about["require"], "rims": files("rims"), "ocsp": files("ocsp"),
    }  # fmt: skip


def batch(command: str, lines: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Any]]:
    path = folder / "cases.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    status = main([command, "--batch", str(path)])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_batch_of_real_quotes_gives_every_expected_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_vectors()
    cases = [quote_case(p) for p in QUOTES]
    assert len(cases) == 38
    status, results = batch("verify-quote", [json.dumps(c) for c in cases], tmp_path, capsys)
    assert status == 0 and [r["id"] for r in results] == [c["id"] for c in cases]
    for folder, result in zip(QUOTES, results, strict=True):
        expect = json.loads((folder / "case.json").read_text())["expect"]
        assert result["verdict"] == {"accept": "accepted", "refuse": "refused"}[expect], (folder.name, result["codes"])
        assert bool(result["codes"]) == (expect == "refuse") and set(result) == {
            "id", "verdict", "development", "codes", "checks",
        }  # fmt: skip


def test_batch_of_real_gpu_evidence_gives_every_expected_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_vectors()
    cases = [gpu_case(p) for p in GPUS]
    assert len(cases) == 12
    status, results = batch("verify-gpu", [json.dumps(c) for c in cases], tmp_path, capsys)
    assert status == 0
    for folder, result in zip(GPUS, results, strict=True):
        expect = json.loads((folder / "case.json").read_text())["expect"]
        assert result["verdict"] == {"accept": "accepted", "refuse": "refused"}[expect], (folder.name, result["codes"])


@pytest.mark.parametrize("form", ["binary", "hex", "base64", "0x"])
def test_quote_may_be_binary_hex_or_base64(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_vectors()
    raw = (GOOD / "quote.bin").read_bytes()
    text = {
        "binary": raw,
        "hex": raw.hex().encode() + b"\n",
        "base64": base64.encodebytes(raw),
        "0x": b"0x" + raw.hex().encode(),
    }
    path = tmp_path / "quote"
    path.write_bytes(text[form])
    arguments = [str(path), "--collateral", str(GOOD / "collateral.json"), "--at", "2026-10-23T00:06:48Z"]
    assert main(["verify-quote", *arguments]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("ACCEPTED") and "DEVELOPMENT" not in first


def test_json_result_is_one_document_with_stable_members(capsys: pytest.CaptureFixture[str]) -> None:
    need_vectors()
    arguments = [str(GOOD / "quote.bin"), "--collateral", str(GOOD / "collateral.json"), "--at", "1792714008", "--json"]
    assert main(["verify-quote", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "accepted" and result["development"] is False
    assert {"verdict", "development", "codes", "checks", "claims", "not_proven", "anchors", "policy"} <= result.keys()


def test_another_root_is_the_only_anchor_and_marks_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_vectors()
    arguments = [str(GOOD / "quote.bin"), "--collateral", str(GOOD / "collateral.json"), "--at", "1792714008"]
    root = VECTORS / "gpu" / "roots" / "device_root.pem"
    assert main(["verify-quote", *arguments, "--root", str(root), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "refused" and result["development"] is True


def test_floor_on_the_command_line_decides(capsys: pytest.CaptureFixture[str]) -> None:
    need_vectors()
    arguments = [str(GOOD / "quote.bin"), "--collateral", str(GOOD / "collateral.json"), "--at", "1792714008"]
    assert main(["verify-quote", *arguments, "--min-tcb-evaluation", "21"]) == 1
    assert "TDX_TCB_EVALUATION" in capsys.readouterr().out


def test_gpu_evidence_from_files(capsys: pytest.CaptureFixture[str]) -> None:
    need_vectors()
    about = json.loads((GPU / "case.json").read_text())
    rims = [str(p) for p in (GPU / "rims").iterdir()]
    arguments = [
        str(GPU / "evidence.json"), "--rim", *rims, "--nonce", about["nonce"], "--at", str(about["at"]),
        "--mode", "spt", "--count", "1,0",
    ]  # fmt: skip
    assert main(["verify-gpu", *arguments, "--require", ",".join(about["require"])]) == 0
    assert main(["verify-gpu", *arguments]) == 1
    assert "GPU_OCSP_MISSING" in capsys.readouterr().out


def test_line_that_is_no_case_is_answered_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "nonsense",
        "[]",
        '{"id": 1}',
        '{"id": 2, "id": 2}',
        '{"id": 3, "quote": "****", "collateral": {}, "at": 1}',
        '{"id": 4, "quote": "AAAA", "collateral": {}, "at": true}',
        '{"id": 5, "quote": "AAAA", "collateral": {}, "at": 1, "policy": "x = 1"}',
        '{"id": 6, "quote": "AAAA", "collateral": {}, "at": 1, "surprise": 1}',
    ]
    status, results = batch("verify-quote", lines, tmp_path, capsys)
    assert status == 2 and len(results) == len(lines)
    assert {r["verdict"] for r in results} == {"refused"}
    assert [r["codes"][0] for r in results] == [
        "INPUT_CASE", "INPUT_CASE", "INPUT_CASE", "INPUT_CASE", "FORMAT_BASE64", "INPUT_CASE", "POLICY_MISSING",
        "INPUT_CASE",
    ]  # fmt: skip


BAD: dict[str, tuple[list[str], int, str]] = {
    "no command": ([], 2, "INPUT_USAGE"),
    "unknown command": (["verfy"], 2, "INPUT_USAGE"),
    "unknown option": (["verify", "x", "--wat"], 2, "INPUT_USAGE"),
    "no such file": (["verify-quote", "/nowhere", "--collateral", "/nowhere", "--at", "1"], 2, "INPUT_FILE"),
    "no time": (["verify-quote", "/dev/null", "--collateral", "/dev/null"], 2, "INPUT_USAGE"),
    "bad time": (["verify-quote", "/dev/null", "--collateral", "/dev/null", "--at", "soon"], 2, "INPUT_TIME"),
    "time without zone": (
        ["verify-quote", "/dev/null", "--collateral", "/dev/null", "--at", "2026-01-01T00:00:00"],
        2,
        "INPUT_TIME",
    ),
    "empty quote": (["verify-quote", "/dev/null", "--collateral", "/dev/null", "--at", "1"], 1, "FORMAT_"),
    "bad nonce": (["verify-gpu", "/dev/null", "--nonce", "12", "--at", "1"], 2, "INPUT_NONCE"),
    "GPU evidence no JSON": (["verify-gpu", "/dev/null", "--nonce", "00" * 32, "--at", "1"], 1, "FORMAT_GPU_JSON"),
    "bad count": (
        ["verify-gpu", "/dev/null", "--nonce", "00" * 32, "--at", "1", "--count", "many"],
        2,
        "INPUT_COUNT",
    ),
    "bad stage": (
        ["verify-gpu", "/dev/null", "--nonce", "00" * 32, "--at", "1", "--require", "luck"],
        2,
        "INPUT_STAGE",
    ),
    "bundle that is none": (["verify", "/dev/null"], 1, "FORMAT_"),
    "plain http": (["verify", "http://a.test"], 2, "INPUT_TARGET"),
    "an address as name": (["verify", "https://127.0.0.1:8443"], 2, "INPUT_TARGET"),
    "bad --connect": (["verify", "https://a.test", "--connect", "nowhere"], 2, "INPUT_ADDRESS"),
    "nobody there": (["verify", "https://a.test", "--connect", "127.0.0.1:1"], 1, "TRANSPORT_CONNECT"),
    "no such policy": (["verify", "https://a.test", "--policy", "/nowhere"], 2, "INPUT_FILE"),
    "empty policy": (["verify", "https://a.test", "--policy", "/dev/null"], 2, "POLICY_"),
    "a time for a live service": (["verify", "https://a.test", "--at", "1"], 2, "INPUT_TIME"),
}


@pytest.mark.parametrize(("arguments", "status", "code"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_with_a_hint_and_never_a_traceback(
    arguments: list[str], status: int, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    told = capsys.readouterr()
    text = told.out + told.err
    assert code in text and "Traceback" not in text
    if not told.out:
        assert len(told.err.strip().splitlines()) == 2 and told.err.splitlines()[1].startswith("  hint: ")


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["receipt", "verify", "--help"]])
def test_help_helps(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "exit status" in capsys.readouterr().out


def test_offline_commands_load_no_http_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from attestation.client.cli import main; "
        "main(['verify-quote', '/dev/null', '--collateral', '/dev/null', '--at', '1', '--json']); "
        "sys.exit(any(m in sys.modules for m in ('httpx2', 'httpcore2', 'asyncio', 'openai')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
