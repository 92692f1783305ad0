"""The recorded enclaves, one boot each per run, for the tests that let other implementations read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.interop.service import Recorded, missing, record


@pytest.fixture(scope="session")
def enclave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Recorded]]:
    """`enclave(gpus)`: what an enclave with that many GPUs served. Skips out loud where the tools are missing."""
    if why := missing():
        pytest.skip(why)
    folders: list[Path] = []

    @cache
    def made(gpus: int) -> Recorded:
        folders.append(tmp_path_factory.mktemp("x"))  # short: socket paths have 107 bytes
        return record(folders[-1], gpus)

    yield made
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tdx(enclave: Callable[[int], Recorded]) -> Recorded:
    """An enclave without a GPU: the certificate is the CCC form."""
    return enclave(0)


@pytest.fixture(scope="session", params=[0, 1], ids=["tdx", "tdx+gpu"])
def either(enclave: Callable[[int], Recorded], request: pytest.FixtureRequest) -> Recorded:
    """An enclave without a GPU, and one with one."""
    return enclave(request.param)
