"""What an engine is to the rest of the enclave: an ASGI app and a lifecycle, and no more.

Implementations: `vllm` (in process), `uds` (the same in a process of its own, restarted when it dies), `echo` (tests).
An engine never answers for another model and never degrades: it is healthy, or it is not and says when to ask again,
or it has failed for good and says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal, Protocol

from attestation.errors import VouchsafeError

__all__ = ["ASGIApp", "Engine", "EngineError", "EngineGone", "Message", "Model", "Receive", "Scope", "Send", "Task"]

Task = Literal["generate", "embed"]
"""What a model does: text from text, or a vector from text. One engine does one of them."""

Scope = MutableMapping[str, Any]  # Any: ASGI's own shape
Message = MutableMapping[str, Any]  # Any: ASGI's own shape
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class EngineError(VouchsafeError):
    """An engine that cannot be started, or answers otherwise than it must: the boot stops. `ENGINE_…`."""


class EngineGone(Exception):
    """Raised by an engine's app: its process ended, or was not there, and this answer will not be completed."""


class Model(Protocol):
    """One `[[models]]` entry of the measured configuration, as far as an engine needs it."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def weights(self) -> str: ...

    @property
    def profile(self) -> str: ...

    @property
    def placement(self) -> Literal["in-process", "process"]: ...

    @property
    def task(self) -> Task: ...

    @property
    def memory_percent(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...


class Engine(Protocol):
    """One model being served.

    model_id   the only model id this engine knows
    task       which routes it serves
    app        the ASGI app, after `start`
    healthy    started, self-tested where answers are stored, and not failed
    retry_after   seconds after which an engine that is not healthy may be again, None when it will not be
    """

    @property
    def model_id(self) -> str: ...

    @property
    def task(self) -> Task: ...

    @property
    def app(self) -> ASGIApp: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def retry_after(self) -> int | None: ...

    async def start(self) -> None:
        """Load and make ready. Raises EngineError; nothing is left behind then."""

    async def self_test(self, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
        """Compare answers at temperature 0 with the measured ones (`enclave.engine.selftest`). Raises EngineError."""

    async def wait_failed(self) -> str:
        """Return, with a one-word reason, when the engine has failed for good. Not when it is stopped in order."""

    async def stop(self) -> None:
        """End it and leave no process, socket or shared memory. Idempotent."""
