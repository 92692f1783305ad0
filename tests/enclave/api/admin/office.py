"""An organisation behind a gateway, and the official SDK as whoever administers it."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx2
from openai import AsyncOpenAI, BaseModel

from enclave.access.ledger import Ledger
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from enclave.tenancy import Tenancy
from tests.enclave.access.world import World
from tests.enclave.api.client import Connection
from tests.enclave.api.serving import custody_of, gateway_of, prices

URL = "https://enclave.test"
MODELS = ("parrot", "org/magpie:v1", "wren")

Model = TypeVar("Model", bound=BaseModel)


class Office:
    """See the module. *world* keeps what was stored; `again` is the same after a restart."""

    def __init__(self, world: World, value: str) -> None:
        self.world, self.value = world, value
        tenancy = Tenancy.__new__(Tenancy)  # as far as administration looks at it
        tenancy.organization, tenancy.ledger = world.organization, Ledger(prices(*MODELS), lambda: world.now)
        self.gateway = gateway_of(custody_of(tenancy), [EchoEngine(model) for model in MODELS])
        connection = Connection()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self.gateway({**scope, "vouchsafe": connection}, receive, send)

        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=URL)
        self.client = self.sdk(value)
        self.organization = self.client.admin.organization

    @classmethod
    async def opened(cls) -> Office:
        world = World()
        _, made = await world.organization.bootstrap()
        return cls(world, made.value)

    def again(self) -> Office:
        return Office(self.world.again(), self.value)

    def sdk(self, value: str, **how: Any) -> AsyncOpenAI:
        how = {"max_retries": 0, **how}
        return AsyncOpenAI(api_key="sk-none", admin_api_key=value, base_url=URL + "/v1", http_client=self.http, **how)

    async def ask(
        self, method: str, path: str, body: Any = None, *, content: Any = None, key: str | None = "", **headers: str
    ) -> httpx2.Response:
        """One request below `/v1/organization/`; *body* goes out as JSON, *content* as it is."""
        sent = {"content-type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        if key is not None:
            sent["authorization"] = f"Bearer {key or self.value}"
        if body is not None:
            return await self.http.request(method, "/v1/organization/" + path, json=body, headers=sent)
        return await self.http.request(method, "/v1/organization/" + path, content=content, headers=sent)


def valid(answer: Model) -> Model:
    """*answer* as it came, held against the SDK's own model: the SDK itself takes what it gets."""
    type(answer).model_validate(answer.to_dict(mode="python"))
    return answer


def error(response: httpx2.Response) -> tuple[int, str | None, str | None]:
    """Status, code and param of a refusal in OpenAI's shape."""
    document = response.json()
    assert set(document) == {"error"} and set(document["error"]) == {"message", "type", "param", "code"}
    return response.status_code, document["error"]["code"], document["error"]["param"]
