"""What the fuzzer found once, kept as tests of their own."""

from __future__ import annotations

import base64
import json

import pytest

from attestation.errors import FormatError, PolicyError
from attestation.gpu import from_nvidia_json
from attestation.policy import Policy
from tests.genuine import NONCE, genuine


def of_version_11(der: bytes) -> bytes:
    """*der* with a version that no certificate has: the library's own kind of error says so, not a ValueError."""
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    return der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x0a")


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def test_gpu_chain_with_a_certificate_of_no_version_is_malformed_evidence() -> None:
    tee = genuine().tee
    chain = [tee.pki[r].der for r in ("device-ak-0", "device-ik-0", "device-ica", "device-identity", "device-root")]
    entry = json.loads(json.dumps(tee.gpu_evidence(NONCE, [0])[0]))
    for number in range(len(chain)):
        changed = [of_version_11(c) if i == number else c for i, c in enumerate(chain)]
        entry["certificate"] = base64.b64encode(b"".join(map(pem, changed))).decode()
        with pytest.raises(FormatError, match="FORMAT_GPU_PEM"):
            from_nvidia_json([entry], [])


def test_policy_that_names_a_root_of_no_version_is_refused() -> None:
    honest = genuine()
    changed = pem(of_version_11(honest.tee.roots.intel)).decode()
    text = honest.policy_text.replace(json.dumps(honest.tee.roots_pem["intel"].decode()), json.dumps(changed))
    assert text != honest.policy_text
    with pytest.raises(PolicyError, match="no certificate"):
        Policy.parse(text)
