"""What an engine is to the rest of the enclave: an ASGI app and a lifecycle, and no more.

Implementations: `vllm` (in process), `echo` (tests). An engine never answers for another model and never degrades: it
is healthy, or it has failed for good and says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

from attestation.errors import VouchsafeError

__all__ = ["ASGIApp", "Engine", "EngineError", "Message", "Model", "Receive", "Scope", "Send"]

Scope = MutableMapping[str, Any]  # Any: ASGI's own shape
Message = MutableMapping[str, Any]  # Any: ASGI's own shape
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class EngineError(VouchsafeError):
    """An engine that cannot be started, or answers otherwise than it must: the boot stops. `ENGINE_…`."""


class Model(Protocol):
    """One `[[models]]` entry of the measured configuration, as far as an engine needs it."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def profile(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...


class Engine(Protocol):
    """One model being served.

    model_id   the only model id this engine knows
    app        the ASGI app, after `start`
    healthy    started and not failed
    """

    @property
    def model_id(self) -> str: ...

    @property
    def app(self) -> ASGIApp: ...

    @property
    def healthy(self) -> bool: ...

    async def start(self) -> None:
        """Load and make ready. Raises EngineError; nothing is left behind then."""

    async def self_test(self, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
        """Compare answers at temperature 0 with the measured ones (`enclave.engine.selftest`). Raises EngineError."""

    async def wait_failed(self) -> str:
        """Return, with a one-word reason, when the engine has failed for good. Not when it is stopped in order."""

    async def stop(self) -> None:
        """End it and leave no process, socket or shared memory. Idempotent."""
