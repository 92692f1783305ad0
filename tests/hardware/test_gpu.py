"""What only an NVIDIA GPU in confidential-computing mode can show. Skips out loud everywhere else.

Run it in the guest as root: `make test TESTS=tests/hardware`. `VOUCHSAFE_TEST_MODEL` names a model directory and
`VOUCHSAFE_TEST_GOLDEN` its stored answers for the engine's test.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path

import pytest

from attestation import roots
from attestation.attester import AttesterError
from attestation.attester.gpu import GpuAttester
from attestation.gpu import GpuEndorsements, appraise, decode, encode
from attestation.policy import Skip, platform_policy
from attestation.result import Checks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture
def attester() -> GpuAttester:
    try:
        made = GpuAttester()
        state = made.state()
    except AttesterError as err:
        pytest.skip(f"needs an NVIDIA GPU: {err.reason}")
    if not state.cc:
        pytest.skip("needs a GPU in confidential-computing mode: the driver says that it is off")
    return made


def test_real_report_chains_to_nvidias_root_and_answers_our_nonce(attester: GpuAttester) -> None:
    nonce = secrets.token_bytes(32)
    evidence = attester.collect(nonce)
    assert decode(encode(evidence)) == evidence
    stages = frozenset({"parse", "nonce", "signature", "chain", "fwid", "distinct", "mode", "count"})
    policy = platform_policy(
        gpu_require=stages, gpu_count=attester.state().count, gpu_switches=0, gpu_mode=Skip("whatever is there")
    ).gpu
    assert not isinstance(policy, Skip)
    checks = Checks()
    facts = appraise(
        evidence, GpuEndorsements({}, {}), nonce=nonce, policy=policy, device_root=roots.NVIDIA_DEVICE_ROOT,
        rim_root=roots.NVIDIA_RIM_ROOT, now=int(time.time()), checks=checks,
    )  # fmt: skip
    assert [c.code for c in checks.failed] == []
    assert facts is not None


def test_h100_profile_boots_and_repeats_its_stored_answers(attester: GpuAttester, tmp_path: Path) -> None:
    model, golden = os.environ.get("VOUCHSAFE_TEST_MODEL"), os.environ.get("VOUCHSAFE_TEST_GOLDEN")
    if not model or not golden:
        pytest.skip("set VOUCHSAFE_TEST_MODEL and VOUCHSAFE_TEST_GOLDEN")
    import json

    answers = json.loads(Path(golden).read_text())
    from enclave import engine
    from enclave.settings import ModelSettings
    from enclave.weights import file_list_digest

    settings = ModelSettings("model", Path(model), file_list_digest(Path(model)), "h100-cc", Path(golden), 4096)

    async def run() -> None:
        served = engine.load(settings, tmp_path)
        try:
            await served.start()
            await served.self_test(answers)
        finally:
            await served.stop()

    asyncio.run(run())
