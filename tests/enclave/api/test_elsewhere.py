"""Every path that OpenAI's SDK knows is served, or refused with a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import openai
import pytest

from enclave.api.admin import Admin
from enclave.api.elsewhere import refusal
from enclave.api.errors import UNKNOWN_URL
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import Caller
from tests.enclave.api.serving import gateway

CALLS = {"_get": "GET", "_get_api_list": "GET", "_post": "POST", "_delete": "DELETE", "_put": "PUT", "_patch": "PATCH"}


def sdk_paths() -> set[tuple[str, str]]:
    """(method, path) of every call in the SDK's sources; an id in a path is written `x`."""
    found: set[tuple[str, str]] = set()
    for file in (Path(openai.__file__).parent / "resources").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
                path = _path(node.args[0]) if node.args else None
                method = CALLS[node.func.attr]
                named = {k.arg: k.value for k in node.keywords}
                if node.func.attr == "_get_api_list" and isinstance(named.get("method"), ast.Constant):
                    method = str(named["method"].value).upper()  # type: ignore[union-attr]  # a Constant
                if path is not None:
                    found.add((method, "/v1" + path))
    return found


def _path(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call) and node.args:  # path_template("/x/{id}", id=id)
        node = node.args[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/"):
        return re.sub(r"\{[^}]*\}", "x", node.value.partition("?")[0])
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values)
    return None


PATHS = sorted(sdk_paths())


def test_the_search_finds_the_sdks_calls() -> None:
    assert len(PATHS) > 150
    assert {("POST", "/v1/chat/completions"), ("GET", "/v1/files/x/content"), ("DELETE", "/v1/models/x")} <= set(PATHS)


@pytest.fixture
async def served(engine: EchoEngine) -> set[tuple[str, str]]:
    return {(m, re.sub(r"\{[^}]*\}", "x", p)) for m, p in (await gateway(engine)).routes | Admin.routes()}


async def test_every_path_of_the_sdk_is_served_or_refused_with_a_reason(
    served: set[tuple[str, str]], engine: EchoEngine
) -> None:
    caller = Caller(await gateway(engine))
    silent = []
    for method, path in PATHS:
        if (method, path) in served:
            continue
        reply = await caller.request(method, path, b"{}")
        assert reply.status in (404, 405, 501), (method, path, reply.status)
        assert reply.error["message"] and path not in reply.error["message"]
        if reply.error["code"] == UNKNOWN_URL.code:
            silent.append((method, path))
        if reply.status == 501:
            assert reply.headers["x-should-retry"] == "false"
        if reply.status == 405:
            assert reply.headers["allow"]
    assert not silent, silent
    assert not engine.calls


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/responses/resp_1", 404, "zero_data_retention"),
        ("DELETE", "/v1/responses/resp_1", 404, "zero_data_retention"),
        ("POST", "/v1/responses/resp_1/cancel", 404, "zero_data_retention"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions/chatcmpl-1", 404, "zero_data_retention"),
        ("POST", "/v1/files", 404, "zero_data_retention"),
        ("POST", "/v1/batches", 404, "zero_data_retention"),
        ("POST", "/v1/images/generations", 501, "not_supported"),
        ("POST", "/v1/audio/speech", 501, "not_supported"),
        ("DELETE", "/v1/models/parrot", 405, "method_not_allowed"),
        ("GET", "/v1/organization/users", 404, "not_supported"),
        ("GET", "/v1/organization/spend_alerts", 404, "not_supported"),
        ("GET", "/v1/organization/projects/p/spend_alerts", 404, "not_supported"),
        ("GET", "/v1/filesystem", 404, "unknown_url"),
        ("GET", "/metrics/x", 404, "unknown_url"),
        ("POST", "/invocations", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
    ],
)
def test_reason_is_chosen_by_the_paths_shape(method: str, path: str, status: int, code: str) -> None:
    made = refusal(method, path)
    assert (made.status, made.code) == (status, code)


def test_long_and_odd_paths_are_unknown_in_no_time() -> None:
    for path in (
        "/" * 100_000,
        "/v1/" + "a/" * 50_000,
        "/v1/responses/" + "x" * 100_000,
        "\x00",
        "/v1/chat/completions\n",
    ):
        assert refusal("GET", path).status in (404, 405)
