"""`vouchsafe verify-quote` and `verify-gpu`: one piece of hardware evidence, no network; and both in batches.

Files and JSON lines come in, verdicts go out. The default policy is the built-in `platform`; with `--root` another
anchor is the only one, and the verdict is marked development. Malformed evidence is a refusal with its code.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from attestation.client.cli_common import ACCEPTED, USAGE, moment, read_file, read_policy_of, say, show
from attestation.client.second_opinion import ask, find_python
from attestation.client.session import read_policy
from attestation.errors import FormatError, InputError, PolicyError, VouchsafeError
from attestation.gpu import GpuEndorsements, from_nvidia_json
from attestation.policy import GPU_STAGES, Policy, Skip, platform_policy, with_roots
from attestation.result import AttestationResult
from attestation.verifier import verify_gpu, verify_quote

__all__ = ["verify_gpu_file", "verify_quote_file"]

MAX_QUOTE_FILE: Final = 256 * 1024
MAX_COLLATERAL: Final = 1024 * 1024
MAX_LINE: Final = 32 * 1024 * 1024
_PEM: Final = re.compile(rb"\s*-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*")


# --- TDX ---


def verify_quote_file(options: Namespace) -> int:
    if options.batch:
        return _batch(options.batch, _quote_case)
    _need(options, quote="QUOTE", collateral="--collateral JSON", at="--at T")
    policy = read_policy_of(options)
    root = _certificate(read_file(options.root, "root", 64 * 1024)) if options.root else None
    result = verify_quote(
        _decoded(read_file(options.quote, "quote", MAX_QUOTE_FILE)),
        read_file(options.collateral, "collateral", MAX_COLLATERAL),
        _quote_policy(policy, root, options.min_tcb_evaluation),
        now=moment(options.at),
        event_log=read_file(options.event_log, "event log", MAX_COLLATERAL) if options.event_log else None,
    )
    return show(result, options, options.quote)


def _quote_policy(policy: Policy | None, root: bytes | None, floor: int | None) -> Policy:
    policy = policy or platform_policy()
    if floor is not None:
        policy = replace(policy, tdx=replace(policy.tdx, min_tcb_evaluation=floor))
    return with_roots(policy, replace(policy.roots, intel=root)) if root is not None else policy


def _quote_case(case: Mapping[str, Any]) -> AttestationResult:  # Any: JSON values, each checked here
    _members(case, {"id", "quote", "collateral", "at"}, {"event_log", "root", "min_tcb_evaluation", "policy"})
    collateral = case["collateral"]
    if not isinstance(collateral, dict):
        raise _bad_case("collateral", "an object (QuoteCollateralV3)")
    log = case.get("event_log")
    return verify_quote(
        _base64(case["quote"], "quote"),
        json.dumps(collateral, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass"),
        _quote_policy(
            _case_policy(case),
            _base64(case["root"], "root") if case.get("root") is not None else None,
            _whole(case["min_tcb_evaluation"], "min_tcb_evaluation")
            if case.get("min_tcb_evaluation") is not None
            else None,
        ),
        now=_whole(case["at"], "at"),
        event_log=None if log is None else _base64(log, "event_log"),
    )


# --- GPU ---


def verify_gpu_file(options: Namespace) -> int:
    if options.batch:
        if options.second_opinion:
            raise InputError(
                "INPUT_USAGE", "a batch is judged by us alone", expected="--batch without --second-opinion"
            )
        return _batch(options.batch, _gpu_case)
    _need(options, nonce="--nonce HEX", at="--at T")
    if not options.evidence and not options.switches:
        raise InputError("INPUT_USAGE", "no evidence given", expected="EVIDENCE.json, --switches F, or both")
    count = _count(options.count) if options.count else None
    policy = _gpu_policy(
        read_policy(Path(options.policy)) if options.policy else None,
        device_root=_certificate(read_file(options.root, "root", 64 * 1024)) if options.root else None,
        rim_root=_certificate(read_file(options.rim_root, "RIM root", 64 * 1024)) if options.rim_root else None,
        mode=options.mode,
        count=count,
        require=options.require.split(",") if options.require else None,
    )
    nonce = _nonce(options.nonce)
    now = moment(options.at)
    gpus, switches = (_evidence_list(f) if f else [] for f in (options.evidence, options.switches))
    endorsements = GpuEndorsements(_files(options.rim, "RIM"), _files(options.ocsp, "OCSP answer"))
    python = find_python(options.nvidia_python) if options.second_opinion else None
    result = verify_gpu(from_nvidia_json(gpus, switches), endorsements, policy, nonce=nonce, now=now)
    subject = options.evidence or options.switches
    if python is None:
        return show(result, options, subject)
    opinion = ask(
        python, gpus, switches=len(switches), nonce=nonce, at=now, rims=endorsements.rims, ocsp=endorsements.ocsp,
        roots=policy.roots, accepted=result.accepted,
    )  # fmt: skip
    return show(result, options, subject, beside={"second_opinion": opinion.as_json()})


def _gpu_case(case: Mapping[str, Any]) -> AttestationResult:  # Any: JSON values, each checked here
    needed = {"id", "evidence", "switches", "nonce", "at", "mode", "count", "require", "rims", "ocsp"}
    _members(case, needed, {"root", "rim_root", "policy"})
    count = case["count"]
    if not isinstance(count, list) or len(count) != 2:
        raise _bad_case("count", "[GPUs, switches]")
    if not isinstance(case["require"], list):
        raise _bad_case("require", "a list of stages")
    roots = [_certificate(_base64(case[k], k)) if case.get(k) is not None else None for k in ("root", "rim_root")]
    policy = _gpu_policy(
        _case_policy(case),
        device_root=roots[0],
        rim_root=roots[1],
        mode=case["mode"],
        count=(_whole(count[0], "count"), _whole(count[1], "count")),
        require=case["require"],
    )
    evidence = from_nvidia_json(*(_list(case[k], k) for k in ("evidence", "switches")))
    endorsements = GpuEndorsements(*(_named(case[k], k) for k in ("rims", "ocsp")))
    now = _whole(case["at"], "at")
    return verify_gpu(evidence, endorsements, policy, nonce=_nonce(case["nonce"]), now=now)


def _gpu_policy(
    policy: Policy | None,
    *,
    device_root: bytes | None,
    rim_root: bytes | None,
    mode: object,
    count: tuple[int, int] | None,
    require: Sequence[object] | None,
) -> Policy:
    """*policy*, or `platform`, narrowed by what the command line or the case says."""
    policy = policy or platform_policy()
    gpu = policy.gpu
    if isinstance(gpu, Skip):
        raise PolicyError("POLICY_GPU", f"policy {policy.name} does not appraise GPUs", actual=gpu.why)
    if mode is not None:
        if mode not in ("spt", "ppcie", "mpt"):
            raise InputError("INPUT_MODE", "not a GPU mode", expected="spt, ppcie or mpt", actual=mode)
        gpu = replace(gpu, mode=mode)
    if count is not None:
        gpu = replace(gpu, count=count[0], switches=count[1])
    if require is not None:
        unknown = [s for s in require if s not in GPU_STAGES]
        if unknown or not require:
            raise InputError(
                "INPUT_STAGE", "not stages of GPU appraisal", expected=", ".join(GPU_STAGES), actual=unknown or "none"
            )
        gpu = replace(gpu, require=frozenset(map(str, require)))
    policy = replace(policy, gpu=gpu)
    if device_root is None and rim_root is None:
        return policy
    roots = policy.roots
    return with_roots(
        policy,
        replace(roots, nvidia_device=device_root or roots.nvidia_device, nvidia_rim=rim_root or roots.nvidia_rim),
    )


# --- batches ---


def _batch(path: str, judge: Callable[[Mapping[str, Any]], AttestationResult]) -> int:  # Any: JSON values
    """One JSON case per line in, one result per line out. 0 when every line was answered; a line that is no case is
    told as such, and the status is 2."""
    status = ACCEPTED
    lines = sys.stdin.buffer if path == "-" else read_file(path, "batch", 1 << 30).splitlines()
    for line in lines:
        if not line.strip():
            continue
        name: object = None
        try:
            case = _load_case(line)
            name = case.get("id")
            result = judge(case)
            answer = _answer(name, result.verdict, result.development, result.codes, result.as_json()["checks"])
        except (InputError, PolicyError) as err:
            status = USAGE
            answer = _answer(name, "refused", False, [err.code], [], str(err))
        except VouchsafeError as err:  # malformed evidence: a refusal
            development = any(case.get(k) is not None for k in ("root", "rim_root"))
            answer = _answer(name, "refused", development, [err.code], [_as_check(err)])
        say(json.dumps(answer, separators=(",", ":")))
    return status


def _answer(
    name: object, verdict: str, development: bool, codes: Sequence[str], checks: Sequence[object], error: str = ""
) -> dict[str, object]:
    body: dict[str, object] = {"id": name, "verdict": verdict, "development": development, "codes": list(codes)}
    body["checks"] = list(checks)
    return {**body, "error": error} if error else body


def _as_check(err: VouchsafeError) -> dict[str, str]:
    told = {"id": "form", "status": "fail", "code": err.code, "reason": err.reason}
    return {**told, "expected": err.expected, "actual": err.actual, "cite": ""}


def _load_case(line: bytes) -> dict[str, Any]:  # Any: JSON values
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a member stands twice")
        return dict(pairs)

    if len(line) > MAX_LINE:
        raise _bad_case("line", f"at most {MAX_LINE} bytes")
    try:
        case = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _bad_case("line", "a JSON object, no member twice") from None
    if not isinstance(case, dict):
        raise _bad_case("line", "a JSON object")
    return case


def _members(case: Mapping[str, object], needed: set[str], optional: set[str]) -> None:
    missing, unknown = needed - case.keys(), case.keys() - needed - optional
    if missing or unknown:
        raise _bad_case("members", f"{', '.join(sorted(needed))}; optional {', '.join(sorted(optional))}")


def _case_policy(case: Mapping[str, object]) -> Policy | None:
    text = case.get("policy")
    if text is None:
        return None
    if not isinstance(text, str):
        raise _bad_case("policy", "the text of a TOML policy")
    return Policy.parse(text)


def _bad_case(member: str, expected: str) -> InputError:
    return InputError("INPUT_CASE", f"not a case: {member}", expected=expected)


# --- small readers ---


def _need(options: Namespace, **arguments: str) -> None:
    missing = [told for name, told in arguments.items() if not getattr(options, name)]
    if missing:
        raise InputError("INPUT_USAGE", "arguments are missing", expected=", ".join(missing), actual="nothing")


def _decoded(raw: bytes) -> bytes:
    """A quote file: binary, hex or base64. Text is decoded strictly; what is neither stays binary."""
    text = b"".join(raw.split())
    if re.fullmatch(rb"(0[xX])?([0-9a-fA-F]{2})+", text):
        return bytes.fromhex(text.decode().lower().removeprefix("0x"))
    if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2}", text):
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            return raw
    return raw


def _certificate(raw: bytes) -> bytes:
    """A root, DER or PEM, as DER; the verifier refuses what is no certificate."""
    match = _PEM.fullmatch(raw)
    if match is None:
        return raw
    try:
        return base64.b64decode(b"".join(match[1].split()), validate=True)
    except binascii.Error:
        raise InputError("INPUT_ROOT", "the root is not PEM", hint="give one certificate, DER or PEM") from None


def _evidence_list(path: str) -> list[object]:
    try:
        value = json.loads(read_file(path, "evidence", MAX_LINE))
    except (ValueError, RecursionError):
        raise FormatError("FORMAT_GPU_JSON", "the evidence is not JSON") from None
    return _list(value, path)


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise FormatError("FORMAT_GPU_JSON", "the evidence is not a list", expected="a list of objects", actual=what)
    return value


def _files(paths: Sequence[str] | None, what: str) -> dict[str, bytes]:
    """By the file's name without suffix, as a RIM is called."""
    return {Path(p).stem if p.endswith((".xml", ".der")) else Path(p).name: read_file(p, what) for p in paths or ()}


def _named(value: object, what: str) -> dict[str, bytes]:
    if not isinstance(value, dict):
        raise _bad_case(what, "an object of name and base64")
    return {name: _base64(text, f"{what} {name}"[:80]) for name, text in value.items()}


def _base64(text: object, what: str) -> bytes:
    if isinstance(text, str):
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise FormatError("FORMAT_BASE64", f"{what} is not base64", expected="base64 with padding")


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad_case(what, "a whole number")
    return value


def _nonce(text: object) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise InputError("INPUT_NONCE", "not a nonce", expected="32 bytes in hex", actual=text)
    return bytes.fromhex(text)


def _count(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,2}),([0-9]{1,2})", text)
    if match is None:
        raise InputError("INPUT_COUNT", "not a count", expected="GPUS,SWITCHES such as 8,4", actual=text)
    return int(match[1]), int(match[2])
