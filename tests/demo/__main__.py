"""`make demo`: the whole path once, as a user and as somebody on the host see it. `make run`: the same, then serve.

    1 start      development TEE, enclave with real vLLM, relay: separate processes
    2 verify     inside the TLS handshake and by the channel proof: one verdict, every check with its reason
    3 chat       through the relay with the unmodified OpenAI SDK; the receipt is verified
    4 search     what crossed the host is searched for prompt and answer; so is the record of a relay that ends TLS
    5 refusals   a swapped certificate, a flipped byte, an edited number
    6 stop       everything that was started

A failure names its stage and the way out, exits 1, and leaves nothing running. The transcript goes to build/demo.txt.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from attestation.client.openai import attested_client
from attestation.client.session import AttestedSession, read_policy
from tests.demo.processes import PYTHON, ROOT, Failed, Process
from tests.demo.refusals import cli, edited_receipt, flipped_quote, refused
from tests.demo.search import found
from tests.demo.stack import NAME, Stack, running

QUESTION = "What can the host see?"
STATUS_SECONDS = 1500.0


class Transcript:
    """Lines for people, and the same lines in build/demo.txt."""

    def __init__(self, *, keep: bool) -> None:
        self._file = None
        if not keep:
            (ROOT / "build").mkdir(exist_ok=True)
            self._file = (ROOT / "build/demo.txt").open("w")
        self.stage = "start"

    def title(self, number: int, stage: str, text: str) -> None:
        self.stage = stage
        self.say(f"\n[{number}/6] {text}" if number > 1 else f"[{number}/6] {text}")

    def say(self, text: str, *, indent: int = 0) -> None:
        block = "\n".join(" " * indent + line for line in text.splitlines() or [""])
        print(block, flush=True)
        if self._file:
            self._file.write(block + "\n")
            self._file.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a local Hugging Face-style chat model")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--keep", action="store_true", help="keep serving until Ctrl-C")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    transcript = Transcript(keep=options.keep)
    begun = time.monotonic()
    try:
        model = _model(options.model)
        transcript.title(
            1, "start", "Starting a development TEE, an enclave with vLLM on the CPU, and the host's relay"
        )
        with running(model=model, tell=lambda line: _progress(transcript, line)) as stack:
            demo(stack, options.question, transcript)
            if options.keep:
                serve(stack)
            transcript.title(6, "stop", "Stopping everything")
        transcript.say("nothing is left running", indent=2)
        print(f"\ndone in {time.monotonic() - begun:.0f} s", flush=True)
        return 0
    except Failed as failed:
        print(f"\nerror: stage {transcript.stage}: {failed.stage}: {failed.why}\nhint: {failed.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def demo(stack: Stack, question: str, t: Transcript) -> None:
    """Stages 2 to 5."""
    connect, policy = f"127.0.0.1:{stack.relay_port}", str(stack.provisioned.policy)
    seen = ("--policy", policy, "--connect", connect)

    t.title(2, "verify", f"Verifying {NAME} through the relay: vouchsafe verify {stack.target} --policy policy.toml")
    t.say(cli("verify", stack.target, *seen, expect=0), indent=2)
    bundle = stack.folder / "bundle.cbor"
    cli("bundle", stack.target, "-o", str(bundle), *seen, expect=0)

    t.title(3, "chat", "Asking through the relay with the unmodified OpenAI SDK")
    record = stack.folder / "host.record"
    with tap("carry", stack.relay_port, record) as port:
        answer, receipt = ask(stack, question, port, t)
    (stack.folder / "receipt.json").write_bytes(receipt.receipt)
    (stack.folder / "request.bin").write_bytes(receipt.request)
    (stack.folder / "response.bin").write_bytes(bytes(receipt.response))
    offline = ("--bundle", str(bundle), "--policy", policy)
    files = ("--request", str(stack.folder / "request.bin"), "--response", str(stack.folder / "response.bin"))
    t.say(
        "the same receipt, verified again offline, from files: vouchsafe receipt verify receipt.json --bundle …",
        indent=2,
    )
    text = cli("receipt", "verify", str(stack.folder / "receipt.json"), *offline, *files, expect=0)
    t.say(text[: text.index("ACCEPTED  evidence")].rstrip(), indent=4)  # the evidence's own checks stand above

    t.title(4, "search", "What the host saw")
    search(stack, question, answer, record, t)

    t.title(5, "refusals", "Three lies, refused")
    refusals(stack, bundle, offline, t)


def ask(stack: Stack, question: str, port: int, t: Transcript) -> tuple[str, Any]:
    """Stream one answer; the text, and the exchange that the client recorded and verified."""
    policy = read_policy(stack.provisioned.policy)
    with attested_client(stack.target, policy=policy, connect=("127.0.0.1", port)) as http:
        client = OpenAI(base_url=f"{stack.target}/v1", api_key=stack.tenant.api_key, http_client=http, max_retries=0)
        t.say(f"user:      {question}", indent=2)
        messages: list[Any] = [{"role": "user", "content": question}]
        parts: list[str] = []
        with client.chat.completions.create(
            model=stack.model_id, messages=messages, temperature=0, max_tokens=200, stream=True
        ) as stream:
            for event in stream:
                parts.extend(choice.delta.content or "" for choice in event.choices)
        answer = "".join(parts)
        t.say(textwrap.fill(f"assistant: {answer}", 100, subsequent_indent=" " * 11), indent=2)
        verdict = http.receipts.verify_last()
        if not verdict.accepted:
            raise Failed("receipt", ", ".join(verdict.codes), "this is a bug: please report it")
        assert http.receipts.last is not None
        t.say(f"receipt {http.receipts.last.receipt_id}: {verdict.verdict}, {len(verdict.checks)} checks", indent=2)
        return answer, http.receipts.last


def search(stack: Stack, question: str, answer: str, record: Path, t: Transcript) -> None:
    """The same search over what the relay carried, and over what a relay that ends TLS gets from a careless client."""
    needle = answer.strip()
    carried = record.read_bytes()
    for name, text in (("prompt", question), ("answer", needle)):
        if found(carried, text):
            raise Failed("search", f"the {name} crossed the relay in the clear", "this is a bug: please report it")
    t.say(f"{len(carried)} bytes crossed the relay: the prompt is not in them, the answer is not in them", indent=2)
    plain = stack.folder / "attack.record"
    with tap("terminate", stack.relay_port, plain) as port:
        careless(stack, question, port)
    seen = plain.read_bytes()
    for name, text in (("prompt", question), ("answer", needle)):
        if not found(seen, text):
            raise Failed("search", f"the search does not find the {name} where TLS was ended", "it proves nothing then")
    t.say(
        "the same search, where a relay ends TLS and a client does not verify: prompt found, answer found",
        indent=2,
    )


def careless(stack: Stack, question: str, port: int) -> None:
    """The same request by a client that verifies nothing, to a relay that ends TLS."""
    import ssl

    import httpx2

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with httpx2.Client(verify=context, trust_env=False, timeout=60) as http:
        client = OpenAI(
            base_url=f"https://127.0.0.1:{port}/v1", api_key=stack.tenant.api_key, http_client=http, max_retries=0
        )
        messages: list[Any] = [{"role": "user", "content": question}]
        stream = client.chat.completions.create(
            model=stack.model_id, messages=messages, temperature=0, max_tokens=200, stream=True
        )
        for _ in stream:
            pass


def refusals(stack: Stack, bundle: Path, offline: tuple[str, ...], t: Transcript) -> None:
    policy = read_policy(stack.provisioned.policy)
    with tap("terminate", stack.relay_port, stack.folder / "swap.record", "--mimic") as port:
        session = AttestedSession(stack.target, policy, connect=("127.0.0.1", port))
        result = session.verify_once()
    if result.accepted:
        raise Failed("refusals", "a swapped certificate was accepted", "this is a bug: please report it")
    t.say("a relay that swaps the certificate (its own key, the genuine evidence copied):", indent=2)
    t.say(refused(json.dumps(result.as_json())), indent=4)
    quote, collateral = flipped_quote(bundle, stack.folder)
    root = str(stack.folder / "tee/roots/intel.der")
    at = str(int(time.time()))
    t.say("a quote with one byte flipped:", indent=2)
    text = cli(
        "verify-quote", str(quote), "--collateral", str(collateral), "--at", at, "--root", root, "--json", expect=1
    )
    t.say(refused(text), indent=4)
    edited = edited_receipt(stack.folder / "receipt.json", stack.folder)
    t.say("a receipt with one number edited:", indent=2)
    t.say(refused(cli("receipt", "verify", str(edited), *offline, "--json", expect=1)), indent=4)


class tap:
    """The tap process in front of the relay, for the length of a `with` block; yields its port."""

    def __init__(self, mode: str, port: int, record: Path, *more: str) -> None:
        command = [PYTHON, "-m", "tests.demo.tap", mode, "--to", f"127.0.0.1:{port}"]
        self._process = Process("tap", [*command, "--record", str(record), "--name", NAME, *more])

    def __enter__(self) -> int:
        line = self._process.wait_for("listening on", seconds=30, hint="is the loopback device up?")
        return int(line.rpartition(":")[2])

    def __exit__(self, *_: object) -> None:
        self._process.stop()


def serve(stack: Stack) -> None:
    """Print what a user pastes, then wait. The operator's status list lasts an hour: a fresh one comes in time."""
    made = stack.provisioned
    key = made.directory / "api-key"
    connect = f"127.0.0.1:{stack.relay_port}"
    print(
        f"""
Serving. Three lines for your own program (.venv/bin/python):

from attestation.client.openai import attested_client; from attestation.client.session import read_policy; import openai
http = attested_client("{stack.target}", policy=read_policy("{made.policy}"), connect=("127.0.0.1", {stack.relay_port}))
client = openai.OpenAI(base_url="{stack.target}/v1", api_key=open("{key}").read(), http_client=http)

Or talk to it:

.venv/bin/vouchsafe chat --target {stack.target} --connect {connect} --policy {made.policy} \\
    --api-key-file {key} --model {stack.model_id}

Or run what docs/clients.md shows, after this line:

. {stack.write_client_env()}

Ctrl-C stops everything.""",
        flush=True,
    )
    ended = threading.Event()
    while True:
        deadline = time.monotonic() + STATUS_SECONDS
        while time.monotonic() < deadline:
            for process in stack.processes:
                if not process.running:
                    raise Failed(process.name, f"ended: {process.last()}", "`make run` again")
            ended.wait(0.5)
        made.write_status()


def _model(folder: Path | None) -> Path | None:
    if folder is not None and not (folder / "config.json").is_file():
        raise Failed(
            "model", f"{folder} holds no config.json", "MODEL=DIR is a local Hugging Face-style model directory"
        )
    return folder


def _progress(t: Transcript, line: str) -> None:
    if line.startswith(("boot ", "enclave: listening", "enclave: ready", "relay: listening", "devtee: ready")):
        t.say(line, indent=2)


if __name__ == "__main__":
    raise SystemExit(main())
