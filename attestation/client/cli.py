"""`vouchsafe`: verify a service and its evidence, talk to it, check its receipts; the operator's statements.

One verdict first, then each check as pass, fail or skip with its reason. `--json` everywhere. Exit status 0 accepted,
1 refused, 2 usage. Runs on the user's machine and trusts Intel's and NVIDIA's roots and the policy it is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from attestation.client.cli_common import USAGE, fail
from attestation.client.handshake import NotAttested, find
from attestation.errors import InputError, TransportError, VouchsafeError

__all__ = ["main"]

EPILOG = "exit status: 0 accepted, 1 refused, 2 usage"


def main(argv: list[str] | None = None) -> int:
    """Run one command. Never raises for a user's mistake or a peer's bytes."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else USAGE
    subject = str(getattr(options, "target", "") or "")
    try:
        return int(options.run(options))
    except (VouchsafeError, NotAttested) as err:
        return fail(err, options, subject)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as err:
        refusal = find(err)
        if refusal is not None:
            return fail(refusal, options, subject)
        return fail(_told(err), options, subject)


def _told(err: Exception) -> VouchsafeError:
    """An HTTP library's error, for a person. Anything else is a bug, and said to be one, without a traceback."""
    if type(err).__module__.partition(".")[0] in ("httpx2", "httpcore2"):
        return TransportError(
            "TRANSPORT_BROKEN",
            f"the connection broke: {type(err).__name__}",
            hint="an answer that was cut is not an answer: ask again",
        )
    if os.environ.get("VOUCHSAFE_TRACEBACK"):
        raise err
    return InputError(
        "CLIENT_INTERNAL", f"a mistake in this program: {type(err).__name__}", hint="VOUCHSAFE_TRACEBACK=1 shows where"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        command = self.prog
        sys.stderr.write(f"error  INPUT_USAGE: {message}\n  hint: `{command} --help` shows what is expected\n")
        raise SystemExit(USAGE)


def _late(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """A command's function, imported when it runs: an offline command loads no HTTP, `--help` nothing."""

    def run(options: argparse.Namespace) -> int:
        return int(getattr(import_module(f"attestation.client.{module}"), name)(options))

    return run


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="vouchsafe", description="LLM inference that you can verify.", epilog=EPILOG)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _service(commands)
    _offline(commands)
    _statements(commands)
    _exception(commands)
    return top


def _command(commands: Any, name: str, module: str, function: str, help: str) -> argparse.ArgumentParser:
    # Any: argparse gives its subparsers action no public name
    made: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, epilog=EPILOG)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    made.set_defaults(run=_late(module, function))
    return made


def _live(p: argparse.ArgumentParser, *, policy: bool = True) -> None:
    p.add_argument("--policy", metavar="F", required=policy, help="what to ask for (TOML)")
    p.add_argument("--exception", metavar="F", help="a signed, dated exception for a TCB status")
    p.add_argument("--connect", metavar="HOST:PORT", help="dial this address instead of the name's")
    p.add_argument("--cache", metavar="DIR", help="keep evidence here between runs")


def _service(commands: Any) -> None:
    p = _command(commands, "verify", "cli_service", "verify_target", "verdict on a service or a saved bundle")
    p.add_argument("target", metavar="TARGET", help="https://NAME[:PORT], or a bundle file")
    _live(p, policy=False)
    p.add_argument("--at", metavar="T", help="for a bundle: when to judge it (default: its own time)")
    p.add_argument("--grace", metavar="TIME", help="with --at: judge it at its own time, if not older than this")
    p.add_argument("--name", metavar="NAME", help="for a bundle: the DNS name it must be for")
    p.add_argument("--first-use", metavar="FILE", help="explore: record who the service says it is, compare, ask")
    p.add_argument("--yes", action="store_true", help="with --first-use: record the first meeting without asking")

    p = _command(commands, "bundle", "cli_service", "bundle", "save all that is needed to verify later, offline")
    p.add_argument("target", metavar="TARGET", help="https://NAME[:PORT]")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    _live(p, policy=False)

    p = _command(commands, "chat", "cli_service", "chat", "verify, then talk; the receipt is checked after each answer")
    p.add_argument("prompt", metavar="PROMPT", nargs="?", help="without one: a line at a time from the terminal")
    p.add_argument("--target", metavar="URL", required=True, help="https://NAME[:PORT]")
    _live(p)
    p.add_argument("--model", metavar="M", required=True)
    p.add_argument("--api-key-file", metavar="F", help="file that holds the API key")
    p.add_argument("--max-tokens", metavar="N", type=int)
    p.add_argument("--checks", action="store_true", help="every check, not only the verdict")
    p.add_argument("--save", metavar="DIR", help="keep receipt, request, response and evidence for later verification")

    p = _command(commands, "models", "cli_service", "models", "the models of a verified service")
    p.add_argument("--target", metavar="URL", required=True, help="https://NAME[:PORT]")
    _live(p)
    p.add_argument("--api-key-file", metavar="F")

    p = _command(commands, "bootstrap", "cli_state", "bootstrap", "make a new service's state; keep what it gives once")
    p.add_argument("target", metavar="TARGET", nargs="?", help="https://NAME[:PORT]")
    _live(p, policy=False)
    p.add_argument("--secret", metavar="F", help="file with the bootstrap secret (- for stdin)")
    p.add_argument("--key", metavar="F", help="where the state key goes: a file that is not there yet")
    p.add_argument("--admin-key", metavar="F", help="where the first admin key goes: a file that is not there yet")
    p.add_argument("--new-secret", metavar="F", help="make a secret instead, and print its line of the configuration")

    p = _command(commands, "unlock", "cli_state", "unlock", "hand the state key to a verified service after a reboot")
    p.add_argument("target", metavar="TARGET", help="https://NAME[:PORT]")
    p.add_argument("--key", metavar="F", required=True, help="the file that `bootstrap` wrote")
    _live(p)

    p = _command(commands, "proxy", "cli_proxy", "proxy", "a local verifying proxy for programs in any language")
    p.add_argument("--to", metavar="URL", required=True, help="https://NAME[:PORT]")
    _live(p)
    p.add_argument("--listen", metavar="ADDR", default="127.0.0.1:8080", help="HOST:PORT (port 0: any) or unix:PATH")
    p.add_argument("--receipts", choices=("require", "off"), default="require", help="off: answers pass unchecked")
    p.add_argument("--reattest", metavar="TIME", default="15m", help="verify anew this often (default 15m)")
    p.add_argument("--expose", action="store_true", help="allow an address beyond loopback; asks for a token")
    p.add_argument("--token-file", metavar="F", help="what programs must send in X-Vouchsafe-Token")

    p = _command(commands, "status", "cli_proxy", "status", "state of a running proxy")
    p.add_argument("--proxy", metavar="ADDR", default="127.0.0.1:8080", help="HOST:PORT or unix:PATH of the proxy")
    p.add_argument("--token-file", metavar="F", help="the token of a proxy beyond loopback")

    group = commands.add_parser("receipt", help="check what a service said it did", epilog=EPILOG)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    p = _command(inner, "verify", "cli_receipt", "verify_receipt_file", "check a receipt against evidence and bytes")
    p.add_argument("receipt", metavar="RECEIPT", help="receipt, JSON")
    p.add_argument("--bundle", metavar="F", required=True, help="the evidence that names the receipt's key")
    p.add_argument("--policy", metavar="F", help="default: the built-in policy `platform`")
    p.add_argument("--exception", metavar="F", help="a signed, dated exception for a TCB status")
    p.add_argument("--at", metavar="T", help="when to judge the evidence (default: its own time)")
    p.add_argument("--request", metavar="F", help="request body as sent")
    p.add_argument("--response", metavar="F", help="response body as received")
    p.add_argument("--cut", action="store_true", help="the response is known to end early")


def _offline(commands: Any) -> None:
    p = _command(commands, "verify-quote", "cli_offline", "verify_quote_file", "one TDX quote, no network")
    p.add_argument("quote", metavar="QUOTE", nargs="?", help="binary, hex or base64")
    p.add_argument("--collateral", metavar="JSON", help="QuoteCollateralV3")
    p.add_argument("--at", metavar="T", help="when to judge it: unix seconds or RFC 3339")
    p.add_argument("--root", metavar="DER", help="the only trust anchor (marks the verdict development)")
    p.add_argument("--policy", metavar="F", help="default: the built-in policy `platform`")
    p.add_argument("--exception", metavar="F", help="a signed, dated exception for a TCB status")
    p.add_argument("--event-log", metavar="F", help="CCEL, or dstack's JSON log")
    p.add_argument("--min-tcb-evaluation", metavar="N", type=int)
    p.add_argument("--batch", metavar="F", help="JSON cases, one per line (- for stdin)")

    p = _command(commands, "verify-gpu", "cli_offline", "verify_gpu_file", "GPU and switch evidence, no network")
    p.add_argument("evidence", metavar="EVIDENCE.json", nargs="?", help="NVIDIA's JSON list")
    p.add_argument("--switches", metavar="F", help="the same for NVSwitches")
    p.add_argument("--mode", metavar="M", choices=("spt", "ppcie", "mpt"))
    p.add_argument("--count", metavar="G,S", help="GPUs and switches")
    p.add_argument("--rim", metavar="F", nargs="+", help="reference values, <RIM id>.xml")
    p.add_argument("--ocsp", metavar="F", nargs="+", help="OCSP answers, DER")
    p.add_argument("--nonce", metavar="HEX", help="the nonce the evidence was asked for with")
    p.add_argument("--at", metavar="T", help="when to judge it: unix seconds or RFC 3339")
    p.add_argument("--root", metavar="PEM", help="the only device root (marks the verdict development)")
    p.add_argument("--rim-root", metavar="PEM", help="the only RIM root (marks the verdict development)")
    p.add_argument("--require", metavar="STAGES", help="stages that decide, comma separated (default: all)")
    p.add_argument("--second-opinion", action="store_true", help="show beside ours what NVIDIA's own SDK says")
    p.add_argument("--nvidia-python", metavar="PYTHON", help="its environment (default: .venv-nvidia/bin/python)")
    p.add_argument("--policy", metavar="F", help="default: the built-in policy `platform`")
    p.add_argument("--batch", metavar="F", help="JSON cases, one per line (- for stdin)")


def _statements(commands: Any) -> None:
    group = commands.add_parser("deployment", help="the operator's statement of who runs what", epilog=EPILOG)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    p = _command(inner, "new", "cli_operator", "new_deployment", "write a statement's payload")
    p.add_argument("--operator", metavar="NAME", required=True)
    p.add_argument("--serial", metavar="N", type=int, required=True, help="not lower than the last one")
    p.add_argument("--dns-name", metavar="NAME", nargs="+", required=True)
    p.add_argument("--role", nargs="+", choices=("both", "model", "gateway"), required=True)
    p.add_argument("--config", metavar="F|HEX", nargs="+", required=True, help="measured configuration, or its SHA-256")
    p.add_argument("--release", metavar="F|HEX", nargs="+", required=True, help="manifest envelope, or payload SHA-256")
    p.add_argument("--platform", metavar="KIND:HEX", nargs="+", required=True, help="piid:… or ppid:…")
    p.add_argument("--gpu", metavar="SERIAL", nargs="+", help="GPU identity serials, hex (default: any GPU)")
    p.add_argument("--valid", metavar="TIME", default="7d", help="how long, at most 7d")
    p.add_argument("--not-before", metavar="T", help="default: now")
    p.add_argument("--salt", metavar="HEX", help="32 bytes (default: random)")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    _sign_and_show(inner, "deployment")

    group = commands.add_parser("status-list", help="what the operator takes back", epilog=EPILOG)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    p = _command(inner, "new", "cli_operator", "new_status", "write a status list's payload")
    p.add_argument("--serial", metavar="N", type=int, required=True, help="not lower than the last one")
    p.add_argument("--issued-at", metavar="T", help="default: now")
    p.add_argument("--valid", metavar="TIME", default="1h", help="how long, at most 1h")
    p.add_argument("--salt", metavar="HEX", help="salt of the statement that names the platforms and GPUs")
    for name, what in (
        ("release", "F|HEX"), ("config", "F|HEX"), ("statement", "F|HEX"),
        ("platform", "KIND:HEX"), ("gpu", "SERIAL"), ("key", "HEX"),
    ):  # fmt: skip
        p.add_argument(f"--{name}", metavar=what, nargs="+", help=f"deny this {name}")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    _sign_and_show(inner, "status")


def _exception(commands: Any) -> None:  # Any: argparse has no public type for it
    group = commands.add_parser("exception", help="a dated exception for a TCB status", epilog=EPILOG)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    p = _command(inner, "new", "cli_operator", "new_tcb_exception", "write an exception's payload")
    p.add_argument("--status", metavar="STATUS", required=True, help="Intel's word: OutOfDate, SWHardeningNeeded, …")
    p.add_argument("--advisory", metavar="ID", nargs="+", default=[], help="advisories that may come with it")
    p.add_argument("--fmspc", metavar="HEX", help="for this kind of platform alone")
    p.add_argument("--reason", metavar="TEXT", required=True, help="why; every result prints it")
    p.add_argument("--not-before", metavar="T", help="default: now")
    p.add_argument("--valid", metavar="TIME", required=True, help="how long, at most 90d")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    _sign_and_show(inner, "exception")


def _sign_and_show(inner: Any, what: str) -> None:
    p = _command(inner, "sign", "cli_operator", f"sign_{what}", "wrap a payload in a signed envelope")
    p.add_argument("file", metavar="FILE", help="payload")
    p.add_argument("--key", metavar="PEM", nargs="+", required=True, help="Ed25519 private keys")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    p = _command(inner, "show", "cli_operator", f"show_{what}", "what an envelope holds, and who signed it")
    p.add_argument("file", metavar="FILE", help="envelope")
    p.add_argument("--key", metavar="HEX", nargs="+", help="public keys that must have signed")


if __name__ == "__main__":
    raise SystemExit(main())
