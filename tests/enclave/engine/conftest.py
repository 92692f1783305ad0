"""Engine processes for the tests of this folder: an echo each, stopped in order afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.enclave.api.conftest import closed
from tests.enclave.engine.workers import Worker

__all__ = ["closed", "second", "worker"]


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    made = Worker(tmp_path / "a")
    await made.engine.start()
    yield made
    await made.engine.stop()


@pytest.fixture
async def second(tmp_path: Path) -> AsyncIterator[Worker]:
    made = Worker(tmp_path / "b", id="second")
    await made.engine.start()
    yield made
    await made.engine.stop()
