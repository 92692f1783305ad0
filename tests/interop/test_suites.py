"""Suites that others wrote, against the whole gateway: schemathesis with a published schema, OpenAI's own API tests,
guidellm as a load. Each speaks plain HTTP to `vouchsafe proxy`, which verifies the service and every receipt.

What is expected of each, and why some of it cannot be, stands in docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from attestation.client.openai import attested_client
from attestation.client.session import read_policy
from tests.demo.processes import PYTHON, ROOT, Process
from tests.demo.provision import provision
from tests.demo.tenant import Tenant, set_up
from tests.enclave.support import NAME

SUITES = ROOT / ".venv-suites"
CHAT, INSTRUCT, EMBED = "gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small"
HINT = "start it by hand and see"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (SUITES / "lock").exists(), reason="the suites are not installed: run tests/interop/setup_suites.sh"
    ),
]


@dataclass(frozen=True)
class Plain:
    """The service behind its verifying proxy, in plain HTTP on loopback."""

    url: str
    tenant: Tenant
    enclave: Process


@pytest.fixture(scope="module")
def plain() -> Iterator[Plain]:
    folder = Path(tempfile.mkdtemp(prefix="vouchsafe-suites-"))
    started: list[Process] = []
    try:
        tee, model = folder / "tee", folder / "model"
        started.append(Process("development TEE", [PYTHON, "-m", "tests.devtee", "--state", str(tee)]))
        started[0].wait_for("devtee: ready", seconds=60, hint=HINT)
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "none"}')
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        made = provision(
            folder / "made", tee, model, None, CHAT, f"tcp:127.0.0.1:{port}", NAME, more=(INSTRUCT,),
            embedders=(EMBED,),
        )  # fmt: skip
        command = [PYTHON, "-m", "tests.enclave.echo_enclave", str(made.config)]
        enclave = Process("enclave", command, env={"LD_LIBRARY_PATH": str(tee / "lib")})
        started.append(enclave)
        enclave.wait_for("enclave: listening on", seconds=60, hint=HINT)
        target = f"https://{NAME}:{port}"
        with attested_client(target, policy=read_policy(made.policy), connect=("127.0.0.1", port)) as http:
            tenant = set_up(http, target, made.secret)
        options = ("--to", target, "--connect", f"127.0.0.1:{port}", "--policy", str(made.policy))
        proxy = Process("proxy", [PYTHON, "-m", "attestation.client.cli", "proxy", *options, "--listen", "127.0.0.1:0"])
        started.append(proxy)
        url = proxy.wait_for("proxy: http://", seconds=60, hint=HINT).split()[1]
        pairs = [f"My API Key={tenant.api_key}", f"My Admin API Key={tenant.admin_key}"]
        keys = Process("keys", [sys.executable, "-m", "tests.interop.keys", url, *pairs])
        started.append(keys)
        yield Plain("http://" + keys.wait_for("listening on", seconds=30, hint=HINT).split()[-1], tenant, enclave)
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def schema(folder: Path) -> Path:
    """OpenAI's published schema where `VOUCHSAFE_OPENAPI` names it; else the one that vLLM generates for its own
    OpenAI-compatible server, of the paths that are served here."""
    if named := os.environ.get("VOUCHSAFE_OPENAPI"):
        return Path(named)
    program = (
        "import importlib, json, sys; from enclave.engine.profiles import PATHS;"
        "get = lambda name: getattr(importlib.import_module(PATHS['0.32.0'][name]), name);"
        "args = get('make_arg_parser')(get('FlexibleArgumentParser')()).parse_args(['--model', 'x']);"
        "document = get('build_app')(args, ('generate', 'embed')).openapi();"
        "json.dump(document, open(sys.argv[1], 'w'))"
    )
    path = folder / "openapi.json"
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run(
        [PYTHON, "-c", program, str(path)], cwd=ROOT, check=True, capture_output=True, env=quiet, timeout=120
    )
    document = json.loads(path.read_text())
    names = (
        "models",
        "chat/completions",
        "completions",
        "embeddings",
        "responses",
        "messages",
        "messages/count_tokens",
    )
    served = [f"/v1/{name}" for name in names]
    document["paths"] = {p: v for p, v in document["paths"].items() if p in served}
    assert len(document["paths"]) >= 6
    path.write_text(json.dumps(document))
    return path


def test_schemathesis_finds_no_fault_of_ours(plain: Plain, tmp_path: Path) -> None:
    base = plain.url + ("/v1" if "VOUCHSAFE_OPENAPI" in os.environ else "")
    done = subprocess.run(
        [
            str(SUITES / "bin/schemathesis"), "run", str(schema(tmp_path)), "--url", base, "-H",
            f"Authorization: Bearer {plain.tenant.api_key}", "--checks", "not_a_server_error", "--phases",
            "examples,fuzzing", "--max-examples", os.environ.get("VOUCHSAFE_EXAMPLES", "50"), "--generation-database",
            "none", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert "Server error" not in done.stdout, done.stdout[-6000:]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert plain.enclave.running


FILES = (
    "chat/test_completions.py", "test_completions.py", "test_embeddings.py", "test_models.py", "test_responses.py",
    "responses/test_input_tokens.py", "admin/organization",
)  # fmt: skip

MUST_PASS = 900
"""Of OpenAI's API tests; docs/compatibility.md says which, and why the others cannot."""


def test_openais_own_api_tests_pass_where_the_endpoint_is_served(plain: Plain, tmp_path: Path) -> None:
    folder = SUITES / "openai-python"
    files = [f"tests/api_resources/{name}" for name in FILES if (folder / "tests/api_resources" / name).exists()]
    done = subprocess.run(
        [
            str(SUITES / "bin/python"), "-m", "pytest", *files, "-n", "0", "-q", "-p", "no:cacheprovider", "--tb",
            "line", "--durations", "0", "-rA", "--inline-snapshot=disable",
        ],
        cwd=folder, capture_output=True, text=True, timeout=850, check=False,
        env={**os.environ, "TEST_API_BASE_URL": plain.url + "/v1"},
    )  # fmt: skip
    (tmp_path / "out.txt").write_text(done.stdout + done.stderr)
    verdicts = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    counts = Counter(verdict for verdict, _ in verdicts)
    print("openai-python API tests:", dict(counts))
    if keep := os.environ.get("VOUCHSAFE_SUITE_REPORT"):
        shutil.copy(tmp_path / "out.txt", keep)
    assert counts["PASSED"] >= MUST_PASS, done.stdout[-4000:]
    assert "Error code: 500" not in done.stdout, done.stdout[-4000:]


def test_guidellm_gets_its_answers(plain: Plain, tmp_path: Path) -> None:
    program = os.environ.get("VOUCHSAFE_GUIDELLM")
    if not program:
        pytest.skip("VOUCHSAFE_GUIDELLM names no guidellm: it drags in PyTorch, so nothing here installs it")
    backend = f"kind=openai_http,target={plain.url},model={CHAT},api_key={plain.tenant.api_key}"
    backend += ",validate_backend=false"  # its probe is GET /health, which is not OpenAI's
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": f"say it {n}"} for n in range(50)]))
    done = subprocess.run(
        [
            program, "run", "--backend", backend, "--profile", "kind=concurrent,streams=4", "--constraint",
            "kind=max_requests,count=50", "--data", f"kind=json_file,path={prompts}", "--disable-console-interactive",
            "--output", "kind=console",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "50" in said and "Traceback" not in said, said[-4000:]
