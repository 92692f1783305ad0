"""One started echo engine and a caller of its gateway, for every test of this folder."""

from __future__ import annotations

import pytest

from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import Caller
from tests.enclave.api.serving import gateway


@pytest.fixture
async def engine() -> EchoEngine:
    made = EchoEngine("parrot")
    await made.start()
    return made


@pytest.fixture
def caller(engine: EchoEngine) -> Caller:
    return Caller(gateway(engine))
