"""An engine process from its start to its end, and how long it waits in between."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from enclave.engine import processes, spawn
from enclave.engine.base import EngineError, EngineGone
from enclave.engine.call import post
from enclave.engine.uds import LONGEST, Backoff
from tests.enclave.api.client import CHAT, chat_body
from tests.enclave.engine.workers import Worker, until

# --- start and stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "code", "reason"),
    [("refuse", "ENGINE_MEMORY", "no such luck"), ("exit", "ENGINE_START", "ended while it started")],
)
async def test_first_start_that_fails_says_why_and_leaves_nothing(
    wish: str, code: str, reason: str, tmp_path: Path
) -> None:
    made = Worker(tmp_path / "a")
    made.wish(**{wish: True})
    before = processes.descendants()
    with pytest.raises(EngineError, match=reason) as refused:
        await made.engine.start()
    assert refused.value.code == code
    assert not made.engine.healthy
    assert made.engine.retry_after is None, "nobody restarts what never started"
    assert processes.descendants().keys() <= before.keys()
    await made.engine.stop()


async def test_start_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "START_SECONDS", 0.0)
    before = processes.descendants()
    made = Worker(tmp_path / "a")
    with pytest.raises(EngineError, match="was not ready within"):
        await made.engine.start()
    assert processes.descendants().keys() <= before.keys()


async def test_path_that_no_socket_can_have_is_refused_before_anything_starts(tmp_path: Path) -> None:
    made = Worker(tmp_path / ("a" * 100))
    with pytest.raises(EngineError, match="ENGINE_SOCKET"):
        await made.engine.start()


async def test_stop_in_order_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    made = Worker(tmp_path / "a")
    before = processes.descendants()
    await made.engine.start()
    below = processes.descendants(made.pid) | {made.pid: processes.descendants()[made.pid]}
    await made.engine.stop()
    await made.engine.stop()
    assert not processes.alive(below)
    assert processes.descendants().keys() <= before.keys()
    assert not (made.folder / "run" / "engine.sock").exists()
    with pytest.raises(EngineGone):
        await post(made.engine.app, CHAT, chat_body())


async def test_stop_while_it_is_being_restarted_leaves_nothing(tmp_path: Path) -> None:
    made = Worker(tmp_path / "a")
    before = processes.descendants()
    await made.engine.start()
    made.wish(refuse=True)
    os.kill(made.pid, signal.SIGKILL)
    await until(lambda: len(made.seen("started")) >= 2)
    await made.engine.stop()
    assert processes.descendants().keys() <= before.keys()


async def test_end_that_is_cancelled_is_an_end_all_the_same(worker: Worker) -> None:
    child = worker.engine._child
    assert child is not None
    pid = {worker.pid: processes.descendants()[worker.pid]}
    os.kill(worker.pid, signal.SIGSTOP)
    ending = asyncio.create_task(child.end(patience=0.3))
    await asyncio.sleep(0.05)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert not processes.alive(pid)


@pytest.mark.parametrize("turns", [1, 5, 30, 300])
async def test_start_that_is_cancelled_at_any_moment_leaves_nothing(turns: int, tmp_path: Path) -> None:
    made = Worker(tmp_path / "a")
    made.wish(slow=600)
    before = processes.descendants()
    starting = asyncio.create_task(made.engine.start())
    for _ in range(turns):
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processes.descendants().keys() <= before.keys()


async def test_frozen_worker_is_killed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn.Child.end, "__kwdefaults__", {"patience": 0.2})
    pid = {worker.pid: processes.descendants()[worker.pid]}
    os.kill(worker.pid, signal.SIGSTOP)
    await asyncio.wait_for(worker.engine.stop(), 20)
    assert not processes.alive(pid)


async def test_starts_take_turns(worker: Worker, second: Worker) -> None:
    """An engine that starts measures the free memory; another one must not change it meanwhile."""
    for one in (worker, second):
        one.wish(slow=0.5)
        os.kill(one.pid, signal.SIGKILL)
    await until(lambda: not (worker.engine.healthy or second.engine.healthy))
    await until(lambda: worker.engine.healthy and second.engine.healthy)
    first, then = sorted(one.seen("started")[-1]["at"] for one in (worker, second))
    assert first[1] <= then[0]


# --- back-off ---------------------------------------------------------------------------------------------------------


def test_waits_double_from_one_second_to_sixty_and_are_spread() -> None:
    middle = Backoff(spread=lambda: 0.5)
    assert [middle.next() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    low, high = Backoff(spread=lambda: 0.0), Backoff(spread=lambda: 1.0)
    assert [low.next(), high.next()] == [0.75, 1.25]
    assert {Backoff().next() for _ in range(20)} != {1.0}
    for _ in range(5000):
        assert middle.next() == LONGEST
    middle.reset()
    assert middle.next() == 1


async def test_process_that_dies_again_and_again_waits_longer_each_time(tmp_path: Path) -> None:
    made = Worker(tmp_path / "a")
    await made.engine.start()
    try:
        for attempt in (1, 2, 3):
            os.kill(made.pid, signal.SIGKILL)
            await until(lambda: not made.engine.healthy)
            await until(lambda: made.engine.healthy)
            assert made.engine._backoff.attempt == attempt, "serving for a moment is no reason to forget"
    finally:
        await made.engine.stop()


async def test_process_that_served_for_long_starts_the_row_afresh(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.engine.uds.SETTLED", 0.0)
    for _ in range(2):
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not worker.engine.healthy)
        await until(lambda: worker.engine.healthy)
        assert worker.engine._backoff.attempt == 1
