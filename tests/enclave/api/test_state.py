"""The state over HTTP: what waits for it, the one bootstrap, the unlock, and words that repeat nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from enclave.custody import Custody
from enclave.engine.echo import EchoEngine
from enclave.tenancy import Slots
from tests.enclave.api.client import CHAT, Caller, Reply, chat_body
from tests.enclave.api.serving import NOW, gateway_of, prices

SECRET = "bootstrap-secret-of-the-test-1234567890"
BOOTSTRAP, UNLOCK = "/v1/state/bootstrap", "/v1/state/unlock"


class Service:
    """Boots over one storage, each with a gateway of its own."""

    def __init__(self, folder: Path) -> None:
        self.path, self.custody = folder / "state.db", list[Custody]()

    async def boot(self) -> Caller:
        custody = Custody(
            f"sqlite:{self.path}", hashlib.sha256(SECRET.encode()).digest(), prices("parrot"),
            {"parrot": Slots(4, 100)}, lambda: NOW,
        )  # fmt: skip
        await custody.look()
        self.custody.append(custody)
        engine = EchoEngine("parrot")
        await engine.start()
        return Caller(gateway_of(custody, [engine]), key=None)

    async def stop(self) -> None:
        while self.custody:
            await self.custody.pop().close()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path)
    yield made
    await made.stop()


async def born(caller: Caller) -> dict[str, Any]:
    reply = await caller.post(BOOTSTRAP, {"secret": SECRET})
    assert reply.status == 200, reply.body
    made: dict[str, Any] = reply.json()
    return made


async def test_nothing_but_the_state_is_served_before_it_is_open(service: Service) -> None:
    caller = await service.boot()
    asked: list[Reply] = [
        await caller.post(CHAT, chat_body()),
        await caller.get("/v1/models"),
        await caller.get("/v1/models/parrot"),
        await caller.get("/v1/organization/projects"),
        await caller.post("/v1/organization/projects", {"name": "x"}),
        await caller.get("/v1/aci/receipts/rcpt-1", headers={"authorization": "Bearer sk-x"}),
        await caller.post("/tokenize", {"model": "parrot", "prompt": "x"}),
    ]
    for reply in asked:
        assert (reply.status, reply.error["code"]) == (503, "state_locked")
        assert reply.headers["x-should-retry"] == "false"
    assert (await caller.get("/v1/state")).json() == {"object": "state", "state": "new"}


async def test_bootstrap_gives_both_keys_once_and_they_work(service: Service) -> None:
    caller = await service.boot()
    made = await born(caller)
    assert set(made) == {"object", "admin_key", "state_key", "checkpoint"}
    assert (await caller.get("/v1/state")).json()["state"] == "open"
    admin = Caller(caller.app, key=made["admin_key"]["value"])
    assert (await admin.post("/v1/organization/projects", {"name": "first"})).status == 200
    again = await caller.post(BOOTSTRAP, {"secret": SECRET})
    assert (again.status, again.error["code"]) == (409, "state_open")
    await service.stop()

    caller = await service.boot()
    assert (await caller.get("/v1/state")).json()["state"] == "locked"
    later = await caller.post(BOOTSTRAP, {"secret": SECRET})
    assert (later.status, later.error["code"]) == (409, "state_locked")
    opened = await caller.post(UNLOCK, {"state_key": made["state_key"], "checkpoint": made["checkpoint"]})
    assert opened.status == 200 and opened.json()["state"] == "open"
    listed = await Caller(caller.app, key=made["admin_key"]["value"]).get("/v1/organization/projects")
    assert [p["name"] for p in listed.json()["data"]] == ["first"]
    # the same call later only tells how far the state has come
    again = await caller.post(UNLOCK, {"state_key": made["state_key"], "checkpoint": opened.json()["checkpoint"]})
    assert again.json()["checkpoint"] == opened.json()["checkpoint"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (BOOTSTRAP, {"secret": "x" * 39}, 401, "invalid_secret"),
        (BOOTSTRAP, {"secret": SECRET + " "}, 400, "invalid_value"),
        (BOOTSTRAP, {"secret": "short"}, 400, "invalid_value"),
        (BOOTSTRAP, {"secret": "x" * 257}, 400, "invalid_value"),
        (BOOTSTRAP, {"secret": 7}, 400, "invalid_value"),
        (BOOTSTRAP, {}, 400, "invalid_value"),
        (BOOTSTRAP, {"secret": SECRET, "force": True}, 400, "unknown_parameter"),
        (UNLOCK, {"state_key": "00" * 32}, 409, "state_new"),
        (UNLOCK, {"state_key": "00" * 31}, 400, "invalid_value"),
        (UNLOCK, {"state_key": "AA" * 32}, 400, "invalid_value"),
        (UNLOCK, {"state_key": "00" * 32, "checkpoint": "00" * 55}, 400, "invalid_value"),
        (UNLOCK, {"state_key": "00" * 32, "checkpoint": "ff" * 56}, 400, "invalid_value"),
        (UNLOCK, {"state_key": "00" * 32, "checkpoint": "00" * 56}, 409, "state_rollback"),
    ],
)
async def test_what_is_not_right_is_refused_and_not_repeated(
    service: Service, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    caller = await service.boot()
    reply = await caller.post(path, body)
    assert (reply.status, reply.error["code"]) == (status, code)
    for value in body.values():
        if isinstance(value, str) and len(value) > 8:
            assert value.encode() not in reply.body
    assert (await caller.get("/v1/state")).json()["state"] == "new"


async def test_wrong_key_and_older_state_do_not_open(service: Service) -> None:
    caller = await service.boot()
    made = await born(caller)
    await service.stop()
    caller = await service.boot()
    wrong = await caller.post(UNLOCK, {"state_key": "00" * 32, "checkpoint": None})
    assert (wrong.status, wrong.error["code"]) == (401, "invalid_state_key")
    ahead = bytearray.fromhex(made["checkpoint"])
    ahead[23] += 9  # a later row of the same journal
    older = await caller.post(UNLOCK, {"state_key": made["state_key"], "checkpoint": ahead.hex()})
    assert (older.status, older.error["code"]) == (409, "state_rollback")
    assert "STATE_ROLLBACK" in older.error["message"] and "rollback suspected" in older.error["message"]
    assert (await caller.get("/v1/state")).json()["state"] == "locked"


@pytest.mark.parametrize("path", [BOOTSTRAP, UNLOCK])
async def test_body_is_small_and_json(service: Service, path: str) -> None:
    caller = await service.boot()
    large = await caller.request("POST", path, b'{"secret": "' + b"x" * 5000 + b'"}')
    assert (large.status, large.error["code"]) == (413, "request_too_large")
    text = await caller.request(
        "POST", path, json.dumps({"secret": SECRET}).encode(), headers={"content-type": "text/x"}
    )
    assert (text.status, text.error["code"]) == (415, "unsupported_media_type")
    broken = await caller.request("POST", path, b"{")
    assert (broken.status, broken.error["code"]) == (400, "invalid_json")
