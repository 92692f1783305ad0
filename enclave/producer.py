"""One producer of evidence per process: quotes and GPU reports, asked for one at a time, off the event loop.

Runs in the enclave. Reading `outblob` or NVML blocks for milliseconds to seconds, as long as the host likes; so each
kind of hardware has one thread of its own, and an `await` here. The threads are daemons: a host that does not answer
cannot keep a stopped enclave alive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from attestation.attester import AttesterError, TeeAttester

if TYPE_CHECKING:
    from attestation.attester.gpu import GpuAttester, GpuState
    from attestation.gpu import GpuEvidence

__all__ = ["Producer", "Worker"]

T = TypeVar("T")
_Job = tuple[Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Worker:
    """One daemon thread that runs calls in order. `run` awaits one; a cancelled call that has not begun is dropped."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    async def run(self, call: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put((call, loop, future))
        return await future

    def close(self, last: Callable[[], Any] = lambda: None) -> None:  # Any: nobody looks at it
        """The thread makes one *last* call after what it is doing, then ends."""
        loop = asyncio.get_running_loop()
        self._jobs.put((last, loop, loop.create_future()))
        self._jobs.put(None)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, loop, future = job
            if future.cancelled():
                continue
            try:
                outcome: tuple[Any, BaseException | None] = (call(), None)
            except BaseException as err:
                outcome = (None, err)
            with suppress(RuntimeError):  # the loop is gone: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, *outcome)
            del job, call, future, outcome


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:  # Any: the call's own type
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


class Producer:
    """The machine's attesters behind awaits. `gpu` is None on a machine that serves without one."""

    def __init__(self, tdx: TeeAttester, gpu: GpuAttester | None) -> None:
        self._tdx, self._gpu = tdx, gpu
        self._tdx_thread = Worker("quotes")
        self._gpu_thread = Worker("gpu-evidence") if gpu is not None else None

    @property
    def has_gpu(self) -> bool:
        return self._gpu is not None

    async def quote(self, report_data: bytes) -> bytes:
        """A canonical quote over 64 bytes. Raises `AttesterError`."""
        return await self._tdx_thread.run(lambda: self._tdx.quote(report_data))

    async def tdx(self, call: Callable[[TeeAttester], T]) -> T:
        """Any other call of the TDX attester, in its thread."""
        return await self._tdx_thread.run(lambda: call(self._tdx))

    async def gpu_evidence(self, nonce: bytes) -> GpuEvidence:
        """Reports of all devices over one 32-byte nonce. Raises `AttesterError`."""
        return await self._ask(lambda gpu: gpu.collect(nonce))

    async def gpu_state(self) -> GpuState:
        """What the driver says of the devices now. Raises `AttesterError`."""
        return await self._ask(lambda gpu: gpu.state())

    async def set_gpu_ready(self, ready: bool) -> None:
        """Allow, or forbid, work on the GPUs. Raises `AttesterError`."""
        await self._ask(lambda gpu: gpu.set_ready(ready))

    def close(self) -> None:
        """End the threads and give the devices back, without waiting for a call that hangs."""
        self._tdx_thread.close(self._tdx.close)
        if self._gpu is not None and self._gpu_thread is not None:
            self._gpu_thread.close(self._gpu.close)

    async def _ask(self, call: Callable[[GpuAttester], T]) -> T:
        if self._gpu is None or self._gpu_thread is None:
            raise AttesterError("ATTESTER_NO_GPU", "this enclave is configured without a GPU")
        gpu = self._gpu
        return await self._gpu_thread.run(lambda: call(gpu))
