"""Numbers about the service for whoever runs it: Prometheus text, under OpenTelemetry's GenAI names.

Runs in the enclave; the reader is the host, which is trusted with nothing. So what it reads is coarse by construction:

  (1) a label's value is one of a list made at boot, or `other`: no project, key, request id or path ever stands in one
  (2) the text is a picture, made at most once a minute; who asks in between gets the same bytes, so that no request can
      be timed by asking often
  (3) tokens are shown down to a whole thousand, and durations in wide buckets without their sum: no request can be
      sized by the difference of two pictures

What a tenant used is told to that tenant's administrators (`/v1/organization/usage`). A host sees the ciphertext's
sizes and times in any case; docs/metrics.md says what these numbers add.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from enclave.engine.base import Receive, Scope, Send

__all__ = ["INTERVAL", "METRICS_PATH", "Metrics"]

METRICS_PATH: Final = "/metrics"
INTERVAL: Final = 60.0
"""Seconds for which a picture stands."""
TOKENS: Final = 1000
SECONDS: Final = (0.1, 1.0, 10.0, 100.0)
OTHER: Final = "other"
_CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

OPERATIONS: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
"""Route → `gen_ai.operation.name`; what is none of these is `other`."""
ERRORS: Final = frozenset(
    {
        "invalid_api_key", "insufficient_scope", "model_not_found", "model_not_allowed", "model_not_supported",
        "rate_limit_exceeded", "insufficient_quota", "engine_unavailable", "overloaded", "server_error",
        "context_length_exceeded", "invalid_value", "invalid_type", "invalid_json", "unsupported_parameter",
        "unknown_parameter", "request_too_large", "request_timeout", "state_locked", "unknown_url",
    }
)  # fmt: skip
LIMITS: Final = frozenset(
    {
        "requests_per_1_minute", "tokens_per_1_minute", "requests_per_1_day", "tokens_per_1_day", "concurrent_requests",
        "concurrent_requests_per_key", "LEDGER_BUDGET",
    }
)  # fmt: skip

Read = Callable[[], float]


class Metrics:
    """See the module. *models*: id → what it does; *clock*: seconds that do not go back."""

    def __init__(self, models: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._models, self._clock = frozenset(models), clock
        self._registry = CollectorRegistry(auto_describe=False)
        self._tokens: dict[tuple[str, str], int] = {}
        self._gauges: dict[str, tuple[str, list[tuple[str | None, Read]]]] = {}
        self._picture, self._until = b"", float("-inf")
        names = ["gen_ai_operation_name", "gen_ai_request_model", "error_type"]
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds", "Requests to models, by how long they took.", names,
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "Streams, by how long their first byte took.", names[:2],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._answers = Counter(
            "vouchsafe_http_responses", "Answers of every kind, by class of their status.", ["status_class"],
            registry=self._registry,
        )  # fmt: skip
        self._refused = Counter(
            "vouchsafe_limited", "Requests refused for a limit, by its kind.", ["kind"], registry=self._registry
        )
        self._registry.register(self)

    def request(
        self, *, route: str, model: str | None, status: int, code: str | None, outcome: str | None, stream: bool,
        seconds: float, first_seconds: float | None, input_tokens: int, output_tokens: int,
    ) -> None:  # fmt: skip
        """One request has been answered, or has lost its caller."""
        self._answers.labels(f"{status // 100}xx" if 100 <= status <= 599 else "none").inc()
        operation = OPERATIONS.get(route)
        if operation is None:
            return
        named = model if model in self._models else OTHER
        error = "" if code is None and outcome in (None, "completed") else self._error(code, outcome)
        self._duration.labels(operation, named, error).observe(seconds)
        if stream and first_seconds is not None and status == 200:
            self._first.labels(operation, named).observe(first_seconds)
        for kind, count in (("input", input_tokens), ("output", output_tokens)):
            if count:
                self._tokens[(named, kind)] = self._tokens.get((named, kind), 0) + count

    def limited(self, kind: str) -> None:
        """A request was refused for a limit of that kind."""
        self._refused.labels(kind if kind in LIMITS else OTHER).inc()

    def watch(self, name: str, about: str, read: Read, model: str | None = None) -> None:
        """Show what *read* gives when a picture is made; once per *name* and *model*, which is one of those at boot."""
        if model is not None and model not in self._models:
            raise ValueError("not a model of this service")
        self._gauges.setdefault(name, (about, []))[1].append((model, read))

    def collect(self) -> Iterator[Metric]:
        """Everything that is not counted as it happens. Called when a picture is made."""
        tokens = CounterMetricFamily(
            "gen_ai_server_token_usage", f"Tokens, down to a whole {TOKENS}.",
            labels=["gen_ai_request_model", "gen_ai_token_type"],
        )  # fmt: skip
        for (model, kind), count in sorted(self._tokens.items()):
            tokens.add_metric([model, kind], count // TOKENS * TOKENS)
        yield tokens
        for name, (about, rows) in sorted(self._gauges.items()):
            labelled = any(about_model is not None for about_model, _ in rows)
            gauge = GaugeMetricFamily(name, about, labels=["gen_ai_request_model"] if labelled else [])
            for about_model, read in rows:
                gauge.add_metric([about_model] if about_model is not None else [], read())
            yield gauge

    def text(self) -> bytes:
        """The picture that stands now."""
        now = self._clock()
        if now >= self._until:
            self._until = now + INTERVAL
            self._picture = b"\n".join(_shown(generate_latest(self._registry).split(b"\n")))
        return self._picture

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET /metrics`: public, like the health routes."""
        body = self.text()
        headers = [(b"content-type", _CONTENT_TYPE), (b"content-length", str(len(body)).encode("ascii"))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def _error(code: str | None, outcome: str | None) -> str:
        if code in ERRORS:
            return str(code)
        return outcome if outcome in ("client_disconnected", "key_revoked") else "_OTHER"


def _shown(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Without sums of durations, which would time single requests, and without the times at which a series began."""
    for line in lines:
        name = line.split(b" ", 3)[2] if line.startswith(b"# ") and line.count(b" ") >= 2 else line.split(b"{")[0]
        name = name.split(b" ")[0]
        if not name.endswith((b"_sum", b"_created")):
            yield line
