"""The bearer key: exactly one header, exactly that scheme, exactly that key."""

from __future__ import annotations

import hashlib

import pytest

from enclave.access import KeyCheck
from enclave.access.keys import bearer

KEY = b"sk-test"
CHECK = KeyCheck(hashlib.sha256(KEY).hexdigest())


def test_right_key_gives_its_digest_and_any_other_none() -> None:
    assert CHECK.allowed(KEY) == hashlib.sha256(KEY).digest()
    for other in (None, b"", b"sk-tes", b"sk-test ", b"SK-TEST", hashlib.sha256(KEY).hexdigest().encode()):
        assert CHECK.allowed(other) is None


@pytest.mark.parametrize("value", [b"Bearer sk-test", b"bearer sk-test", b"BEARER   sk-test"])
def test_bearer_token_is_taken_from_its_header(value: bytes) -> None:
    assert bearer([(b"host", b"x"), (b"authorization", value)]) == KEY


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"Basic sk-test", b"Bearersk-test", b"Bearer a b", b"Bearer \xff"]
)
def test_other_authorization_is_no_token(value: bytes) -> None:
    assert bearer([(b"authorization", value)]) is None


def test_two_authorization_headers_are_no_token() -> None:
    assert bearer([(b"authorization", b"Bearer sk-test")] * 2) is None


@pytest.mark.parametrize("digest", ["", "00" * 31, "zz" * 32])
def test_malformed_digest_is_refused_at_construction(digest: str) -> None:
    with pytest.raises(ValueError):
        KeyCheck(digest)
