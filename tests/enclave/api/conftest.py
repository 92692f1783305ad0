"""One started echo engine and a caller of its gateway, for every test of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import Caller
from tests.enclave.api.serving import OPENED, gateway


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Whatever the test has opened is closed in its own loop."""
    yield
    while OPENED:
        await OPENED.pop().close()


@pytest.fixture
async def engine() -> EchoEngine:
    made = EchoEngine("parrot")
    await made.start()
    return made


@pytest.fixture
async def caller(engine: EchoEngine) -> Caller:
    return Caller(await gateway(engine))
