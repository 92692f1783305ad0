"""The answer to a channel request: strict JSON in, a `ChannelProof` of exact sizes out."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from attestation.channel import MAX_ANSWER, ChannelProof, channel_request
from attestation.errors import FormatError

NONCE, EXPORTER, NODE = b"n" * 32, b"x" * 32, b"h" * 64


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


STEP = {"side": "left", "hash": b64(NODE)}
HONEST: dict[str, Any] = {"quote": b64(b"quote"), "path": [STEP], "gpu": None, "binding": "exporter"}


def read(exporter: bytes | None = EXPORTER, **changes: Any) -> ChannelProof:
    body = {k: v for k, v in (HONEST | changes).items() if v is not ...}
    return ChannelProof.from_answer(json.dumps(body).encode(), nonce=NONCE, exporter=exporter)


def test_an_answer_becomes_a_proof_with_the_clients_own_nonce_and_exporter() -> None:
    proof = read(gpu=b64(b"gpu"))
    assert proof == ChannelProof(NONCE, EXPORTER, b"quote", (("left", NODE),), b"gpu", "exporter")
    assert read(None, binding="key").exporter is None


def test_a_proof_bound_to_the_key_is_not_taken_where_the_exporter_was_asked_for() -> None:
    with pytest.raises(FormatError, match="exporter"):
        read(binding="key")
    with pytest.raises(FormatError, match="exporter"):
        read(None)


@pytest.mark.parametrize(
    "changes",
    [
        {"quote": ...}, {"path": ...}, {"gpu": ...}, {"binding": ...}, {"nonce": b64(NONCE)}, {"quote": None},
        {"quote": 1}, {"quote": "a"}, {"quote": "YQ"}, {"quote": "YR=="}, {"quote": "YQ==\n"}, {"quote": "Y-Q="},
        {"gpu": 1}, {"gpu": "*"}, {"binding": None}, {"binding": "none"}, {"binding": ["exporter"]}, {"path": None},
        {"path": {}}, {"path": [STEP] * 11}, {"path": [[]]}, {"path": [{"side": "left"}]}, {"path": [STEP | {"x": 1}]},
        {"path": [STEP | {"side": "up"}]}, {"path": [STEP | {"side": ["left"]}]}, {"path": [STEP | {"hash": None}]},
        {"path": [STEP | {"hash": b64(NODE[:-1])}]}, {"path": [STEP | {"hash": b64(NODE + b"a")}]},
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        read(**changes)
    assert caught.value.code == "FORMAT_CHANNEL"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b"\xff\xfe", b"[" * 90_000, b"{" * 90_000, b" " * (MAX_ANSWER + 1), b'{"quote": NaN}',
        json.dumps(HONEST).encode("utf-16"), json.dumps(HONEST).encode().replace(b'"gpu"', b'"path": [], "gpu"'),
    ],
)  # fmt: skip
def test_what_is_no_plain_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        ChannelProof.from_answer(raw, nonce=NONCE, exporter=EXPORTER)
    assert caught.value.code == "FORMAT_CHANNEL"


@pytest.mark.parametrize(
    "parts",
    [
        (NONCE[:-1], EXPORTER, b"q", (), None, "exporter"), (b"", EXPORTER, b"q", (), None, "exporter"),
        (NONCE, EXPORTER[:-1], b"q", (), None, "exporter"), (NONCE, None, b"q", (), None, "exporter"),
        (NONCE, EXPORTER, b"q", (), None, "key"), (NONCE, EXPORTER, b"q", (), None, "none"),
        (NONCE, EXPORTER, b"q", (("left", b""),), None, "exporter"),
        (NONCE, EXPORTER, b"q", (("up", NODE),), None, "exporter"),
        (NONCE, EXPORTER, b"q", (("left", NODE),) * 11, None, "exporter"),
    ],
)  # fmt: skip
def test_a_proof_of_other_sizes_cannot_be_made(parts: Any) -> None:
    """The formulas take what a proof holds: a wrong size must not reach them as an error of their own."""
    with pytest.raises(FormatError) as caught:
        ChannelProof(*parts)
    assert caught.value.code == "FORMAT_CHANNEL"


def test_the_request_says_nonce_gpu_and_binding_and_nothing_else() -> None:
    body = json.loads(channel_request(b"\xff" * 32, gpu=True, binding="exporter"))
    assert body == {"nonce": "_" * 42 + "8", "gpu": True, "binding": "exporter"}
