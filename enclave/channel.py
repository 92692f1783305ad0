"""The channel proof's server side (ratls facts §3.5): one quote for all connections that wait at the same moment.

Runs in the enclave. A client sends a nonce over its connection; the enclave takes the TLS exporter of that very
connection from its own socket, hashes both with its certificate's key and claims into a leaf, and has the CPU sign
the root of a Merkle tree over all waiting leaves. A caller's binder is never signed, and no value that a client
chose reaches the CPU or a GPU unhashed: this process is no oracle.

The quote service, not the CPU, is scarce: quotes are made one at a time with a pause between them, the queue is
bounded (503), and each connection may ask a few times (429).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal
from weakref import WeakKeyDictionary

from attestation import binding
from attestation.gpu import encode as encode_gpu
from enclave.api.errors import Refusal, Refused
from enclave.identity import Connection
from enclave.producer import Producer

__all__ = ["Allowance", "ChannelProver"]

QUEUE: Final = 1 << binding.MAX_PATH
"""Connections that may wait: as many as one tree holds."""
PAUSE: Final = 0.02
"""Seconds from one quote's start to the next at least: at most fifty a second, whatever clients do."""
GPU_QUEUE: Final = 8
"""Fresh GPU reports that may wait: each is for one connection alone and takes the driver tens of milliseconds."""
WAIT: Final = 20.0
BURST: Final = 4
REFILL_S: Final = 15.0


@dataclass(slots=True)
class _Waiting:
    leaf: bytes
    done: asyncio.Future[tuple[bytes, list[tuple[binding.Side, bytes]]]] = field(repr=False)


class Allowance:
    """A few requests per connection, then one every `REFILL_S` seconds. Forgotten with the connection."""

    def __init__(
        self, burst: int = BURST, refill_s: float = REFILL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._refill, self._clock = burst, refill_s, clock
        self._left: WeakKeyDictionary[Connection, tuple[float, float]] = WeakKeyDictionary()

    def take(self, connection: Connection) -> None:
        """Raises `Refused` 429 when *connection* has asked too often."""
        now = self._clock()
        left, at = self._left.get(connection, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) / self._refill)
        if left < 1:
            wait = max(1, round((1 - left) * self._refill))
            raise Refused(_refusal(429, "This connection has asked for evidence too often.", "rate_limited", wait))
        self._left[connection] = (left - 1, now)


class ChannelProver:
    """Answers channel proofs. Owns one task while anybody waits. Used from one event loop."""

    def __init__(
        self, producer: Producer, *, allowance: Allowance | None = None, queue: int = QUEUE, pause: float = PAUSE
    ) -> None:
        self._producer, self._allowance = producer, allowance or Allowance()
        self._limit, self._pause = min(queue, QUEUE), pause
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._gpu_waiting = 0
        self.quotes = 0

    async def prove(
        self, connection: Connection, nonce: bytes, *, gpu: bool, bound: Literal["exporter", "key"]
    ) -> bytes:
        """The JSON answer for *connection*. Raises `Refused` 429 or 503, or `AttesterError`.

        gpu   asks for GPU evidence made for this connection; null in the answer on a machine without a GPU"""
        self._allowance.take(connection)
        if len(self._waiting) >= self._limit:
            raise Refused(_refusal(503, "Too many connections wait for a proof.", "overloaded", 2))
        identity = connection.identity
        exporter = connection.exporter(nonce) if bound == "exporter" else None
        carried = await self._fresh_gpu(identity.key_hash, exporter, nonce) if gpu else None
        digest = None if carried is None else binding.gpu_digest(carried)
        leaf = binding.connection_leaf(identity.key_hash, exporter, nonce, identity.claims_bytes, digest, bound)
        quote, path = await self._quote(leaf)
        return json.dumps(
            {
                "quote": _b64(quote),
                "path": [{"side": side, "hash": _b64(sibling)} for side, sibling in path],
                "gpu": None if carried is None else _b64(carried),
                "binding": bound,
            }
        ).encode()

    async def close(self) -> None:
        """Stop the task; whoever still waits gets an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            waiting.done.cancel()
        self._waiting.clear()

    async def _fresh_gpu(self, k: bytes, exporter: bytes | None, nonce: bytes) -> bytes | None:
        if not self._producer.has_gpu:
            return None
        if self._gpu_waiting >= GPU_QUEUE:
            raise Refused(_refusal(503, "Too many connections wait for a GPU report.", "overloaded", 2))
        self._gpu_waiting += 1
        try:
            wire = binding.connection_gpu_nonce(k, exporter or bytes(binding.EXPORTER_SIZE), nonce)
            async with asyncio.timeout(WAIT):
                return encode_gpu(await self._producer.gpu_evidence(wire))
        except TimeoutError:
            raise Refused(_refusal(503, "The GPU did not answer in time.", "overloaded", 5)) from None
        finally:
            self._gpu_waiting -= 1

    async def _quote(self, leaf: bytes) -> tuple[bytes, list[tuple[binding.Side, bytes]]]:
        waiting = _Waiting(leaf, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
        try:
            async with asyncio.timeout(WAIT):
                return await waiting.done
        except TimeoutError:
            raise Refused(_refusal(503, "The platform did not sign in time.", "overloaded", 5)) from None

    async def _serve(self) -> None:
        """Quotes, one after the other, until nobody waits."""
        while True:
            begun = time.monotonic()
            batch = [w for w in self._waiting if not w.done.done()]
            self._waiting = []
            if not batch:
                return
            try:
                root, paths = binding.merkle_paths([w.leaf for w in batch])
                quote = await self._producer.quote(root)
                self.quotes += 1
            except Exception as err:
                for waiting in batch:
                    if not waiting.done.done():
                        waiting.done.set_exception(err)
            else:
                for waiting, path in zip(batch, paths, strict=True):
                    if not waiting.done.done():
                        waiting.done.set_result((quote, path))
            await asyncio.sleep(max(0.0, begun + self._pause - time.monotonic()))


def _refusal(status: int, message: str, code: str, retry_after: int) -> Refusal:
    return Refusal(status, message, "server_error", code, headers=((b"retry-after", str(retry_after).encode()),))


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
