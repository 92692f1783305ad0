"""What the host may count: coarse, bounded, and never a word that somebody else chose."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from enclave.metrics import INTERVAL, TOKENS, Metrics

CANARY = "canary-of-a-tenant"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics({"parrot": "generate", "magpie": "embed"}, clock)


def count(metrics: Metrics, **changed: Any) -> None:
    told: dict[str, Any] = {
        "route": "/v1/chat/completions", "model": "parrot", "status": 200, "code": None, "outcome": "completed",
        "stream": True, "seconds": 0.5, "first_seconds": 0.05, "input_tokens": 10, "output_tokens": 20, **changed,
    }  # fmt: skip
    metrics.request(**told)


def read(metrics: Metrics, clock: Clock) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A fresh picture, as Prometheus reads it."""
    clock.now += INTERVAL
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[(name, tuple(sorted(labels.items())))]


def test_requests_are_counted_under_the_names_of_the_convention(metrics: Metrics, clock: Clock) -> None:
    for _ in range(3):
        count(metrics)
    count(metrics, route="/v1/embeddings", model="magpie", stream=False, status=503, code="engine_unavailable")
    found = read(metrics, clock)
    chat = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "parrot"}
    assert value(found, "gen_ai_server_request_duration_seconds_count", error_type="", **chat) == 3
    assert value(found, "gen_ai_server_request_duration_seconds_bucket", error_type="", le="0.1", **chat) == 0
    assert value(found, "gen_ai_server_request_duration_seconds_bucket", error_type="", le="1.0", **chat) == 3
    assert value(found, "gen_ai_server_time_to_first_token_seconds_count", **chat) == 3
    embed = {"gen_ai_operation_name": "embeddings", "gen_ai_request_model": "magpie"}
    assert value(found, "gen_ai_server_request_duration_seconds_count", error_type="engine_unavailable", **embed) == 1
    assert value(found, "vouchsafe_http_responses_total", status_class="5xx") == 1


def test_picture_stands_for_a_minute_whatever_happens(metrics: Metrics, clock: Clock) -> None:
    first = metrics.text()
    for _ in range(100):
        count(metrics)
    clock.now += INTERVAL - 0.01
    assert metrics.text() == first
    clock.now += 0.01
    assert metrics.text() != first


def test_tokens_and_durations_do_not_show_one_request(metrics: Metrics, clock: Clock) -> None:
    count(metrics, input_tokens=TOKENS * 5, output_tokens=TOKENS - 1)
    before = read(metrics, clock)
    count(metrics, input_tokens=17, output_tokens=0, seconds=0.737)
    after = read(metrics, clock)
    for kind, tokens in (("input", 5 * TOKENS), ("output", 0)):
        labels = {"gen_ai_request_model": "parrot", "gen_ai_token_type": kind}
        assert value(before, "gen_ai_server_token_usage_total", **labels) == tokens
        assert value(after, "gen_ai_server_token_usage_total", **labels) == tokens
    assert not [name for name, _ in after if name.endswith(("_sum", "_created"))]
    assert b"737" not in metrics.text()
    count(metrics, output_tokens=1)
    labels = {"gen_ai_request_model": "parrot", "gen_ai_token_type": "output"}
    assert value(read(metrics, clock), "gen_ai_server_token_usage_total", **labels) == TOKENS  # nothing is lost


def test_what_others_choose_is_never_a_label_and_makes_no_series(metrics: Metrics, clock: Clock) -> None:
    count(metrics, model="other-model", code="made-up", route="/v1/chat/completions", status=400)
    metrics.limited("made-up")
    size = len(read(metrics, clock))
    for n in range(10_000):
        odd = f"{CANARY}-{n}"
        count(metrics, model=odd, code=odd, outcome=odd, route="/v1/chat/completions", status=400)
        count(metrics, route=odd, model=odd, code=odd, status=400)
        metrics.limited(odd)
    assert len(read(metrics, clock)) == size
    assert CANARY.encode() not in metrics.text()


def test_gauges_are_read_when_a_picture_is_made(metrics: Metrics, clock: Clock) -> None:
    running = {"parrot": 3.0}
    metrics.watch("vouchsafe_engine_up", "Whether the engine can answer.", lambda: running["parrot"], "parrot")
    metrics.watch("vouchsafe_state_open", "Whether the state is open.", lambda: 1.0)
    assert value(read(metrics, clock), "vouchsafe_engine_up", gen_ai_request_model="parrot") == 3
    running["parrot"] = 0
    found = read(metrics, clock)
    assert value(found, "vouchsafe_engine_up", gen_ai_request_model="parrot") == 0
    assert value(found, "vouchsafe_state_open") == 1
    with pytest.raises(ValueError, match="not a model"):
        metrics.watch("x", "x", lambda: 0.0, CANARY)


async def test_app_says_the_picture(metrics: Metrics) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    await metrics.app({}, receive, send)
    assert (
        sent[0]["status"] == 200
        and (b"content-type", b"text/plain; version=0.0.4; charset=utf-8") in sent[0]["headers"]
    )
    assert sent[1]["body"] == metrics.text()
