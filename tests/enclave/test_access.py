"""The bearer key: exactly one header, exactly that scheme."""

from __future__ import annotations

import pytest

from enclave.access.keys import bearer

KEY = b"sk-test"


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
