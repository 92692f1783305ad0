"""LangChain's own standard tests against the service through the local proxy, run in `.venv-clients`."""

from __future__ import annotations

import re

import httpx2
import pytest

from tests.demo.processes import ROOT
from tests.end_to_end.shell import Shell

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

PASSES = 21
"""Tests of the pinned langchain-tests that a model without tools, JSON and images can pass."""

REASONS = (
    "Test requires tool calling", "Test requires tool choice", "Test requires structured output",
    "Test requires json mode support", "Model does not support ", "Model does not explicitly support Anthropic inputs",
    "VCR not set up",
)  # fmt: skip


def test_langchains_standard_tests_pass_through_the_proxy(
    shell: Shell, proxy_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # No conftest and no configuration of ours: the suite runs as it comes. One event loop for all its tests, because
    # ChatOpenAI keeps connections from one test to the next, and a connection belongs to the loop it was opened in.
    done = shell.run(
        "python -m pytest --noconftest -c /dev/null --rootdir tests/end_to_end -p no:cacheprovider -q -rs"
        " -o asyncio_mode=auto -o asyncio_default_test_loop_scope=session -o asyncio_default_fixture_loop_scope=session"
        f" {ROOT / 'tests/end_to_end/langchain_standard.py'}",
        VOUCHSAFE_PROXY=proxy_url,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    counted = re.search(r"^(\d+) passed, (\d+) skipped", done.stdout, re.MULTILINE)
    assert counted, done.stdout[-2000:]
    assert int(counted[1]) >= PASSES
    skips = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE)
    assert skips and [reason for reason in skips if not reason.startswith(REASONS)] == []
    state = httpx2.get(f"{proxy_url}/vouchsafe/status.json", trust_env=False).json()
    assert state["receipts_verified"] >= PASSES and state["receipts_refused"] == 0
    with capsys.disabled():
        print(f"\nlangchain standard tests: {counted[0]}")
