"""One direction at a time, and the whole loop in this process: what a subprocess cannot be made to do on demand."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from host.address import Endpoint, TcpAddress, UnixAddress, parse_address, resolve
from host.limits import Limits
from host.listen import open_listener
from host.relay import Relay
from host.routes import RouteTable
from host.splice import DONE, READ, WRITE, Direction, LegFailed, PipePool
from tests.host.harness import Backend, dial, receive_digest, send_digest, together
from tests.host.hellos import hello

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[tuple[Pair, Pair]]:
    """Two socket pairs: write to [0][0], a direction carries [0][1] → [1][0], read from [1][1]."""
    first, second = socket.socketpair(), socket.socketpair()
    first[1].setblocking(False)
    second[0].setblocking(False)
    yield first, second
    for sock in (*first, *second):
        sock.close()


@pytest.mark.parametrize("pipes", [4, 0], ids=["splice", "copy"])
def test_backpressure_holds_bytes_and_loses_none(ends: tuple[Pair, Pair], pipes: int) -> None:
    (writer, source), (sink, reader) = ends
    pool = PipePool(most=pipes)
    direction = Direction(source, sink, pool, replay=b"hello")
    payload = os.urandom(1_500_000)

    def write() -> None:
        writer.sendall(payload)
        writer.shutdown(socket.SHUT_WR)

    got = bytearray()
    reader.settimeout(0.02)
    with together(write):
        direction.step()  # the replay
        while direction.want != WRITE:  # nobody reads: sooner or later it stalls
            direction.step()
            time.sleep(0.001)
        held = direction.moved
        direction.step()
        assert (direction.want, direction.moved) == (WRITE, held)
        while direction.want != DONE:
            direction.step()
            with contextlib.suppress(TimeoutError):
                got += reader.recv(30_000)
        while piece := reader.recv(65536):
            got += piece
    assert bytes(got) == b"hello" + payload
    assert direction.moved == len(got)
    assert pool.open <= 1


def test_idle_direction_holds_no_pipe_and_a_stalled_one_holds_one(ends: tuple[Pair, Pair]) -> None:
    (writer, source), (sink, _) = ends
    pool = PipePool(most=1)
    direction = Direction(source, sink, pool)
    direction.step()
    assert direction.want == READ
    first = pool.take()
    assert first is not None  # the only pipe is free while nothing is held
    pool.give(first)
    writer.setblocking(False)
    while direction.want != WRITE:
        with contextlib.suppress(BlockingIOError):
            writer.send(bytes(100_000))
        direction.step()
    assert pool.take() is None
    direction.close()
    assert pool.open == 0  # it held bytes: closed, never lent again


def test_bytes_of_a_dropped_stream_never_reach_the_next_one(ends: tuple[Pair, Pair]) -> None:
    (writer, source), (sink, _) = ends
    pool = PipePool(most=1)
    stalled = Direction(source, sink, pool)
    writer.setblocking(False)
    while stalled.want != WRITE:
        with contextlib.suppress(BlockingIOError):
            writer.send(b"old" * 30_000)
        stalled.step()
    stalled.close()
    other_in, other_out = socket.socketpair(), socket.socketpair()
    other_in[1].setblocking(False)
    other_out[0].setblocking(False)
    fresh = Direction(other_in[1], other_out[0], pool)
    other_in[0].sendall(b"new")
    fresh.step()
    assert other_out[1].recv(100) == b"new"
    for sock in (*other_in, *other_out):
        sock.close()


def test_broken_end_is_named(ends: tuple[Pair, Pair]) -> None:
    (writer, source), (sink, reader) = ends
    direction = Direction(source, sink, PipePool())
    reader.close()
    writer.sendall(b"x")
    with pytest.raises(LegFailed) as failed:
        direction.step()
    assert not failed.value.at_source
    assert direction.want == DONE


def test_no_pipe_is_an_answer_and_not_an_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pool = PipePool()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))  # noqa: PTH208  # one descriptor fewer
    try:
        taken = [pool.take() for _ in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert taken[-1] is None
    for pipe in taken:
        if pipe is not None:
            pool.discard(pipe)
    assert pool.open == 0


def test_pipe_that_cannot_be_enlarged_is_used_as_it_is() -> None:
    pool = PipePool(wanted=1 << 31)  # above fs.pipe-max-size for everybody
    pipe = pool.take()
    assert pipe is not None
    assert 4096 <= pipe.capacity < 1 << 31
    pool.discard(pipe)


def test_pool_keeps_few_and_closes_the_rest() -> None:
    pool = PipePool(most=8, keep=2)
    pipes = [pool.take() for _ in range(9)]
    assert pipes[8] is None
    for pipe in pipes[:8]:
        assert pipe is not None
        pool.give(pipe)
    assert pool.open == 2
    pool.close()
    assert pool.open == 0


@contextlib.contextmanager
def relay_here(endpoints: tuple[Endpoint, ...], pipes: int = 256) -> Iterator[tuple[str, Relay]]:
    listener = open_listener(TcpAddress("127.0.0.1", 0))
    routes = RouteTable([], UnixAddress("/unused"))
    relay = Relay([listener], routes, {"default": endpoints}, Limits(drain_timeout=0.2), pipes=pipes, quiet=True)
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield str(listener.address), relay
    finally:
        relay.stop()
        thread.join(10)
        assert not thread.is_alive()
        relay.stop()  # a signal that comes after the end finds nothing to do


def test_second_address_of_a_backend_is_tried_when_the_first_refuses() -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        nobody = Endpoint(socket.AF_INET, gone.getsockname())
        missing = Endpoint(socket.AF_UNIX, "/nonexistent/backend.sock")
        with (
            Backend("tcp:127.0.0.1:0") as backend,
            relay_here((nobody, missing, *resolve(parse_address(backend.address)))) as (address, _),
            dial(address) as client,
        ):
            client.sendall(hello())
            backend.accept().close()


def test_streams_go_on_without_any_pipe() -> None:
    with (
        Backend("tcp:127.0.0.1:0") as backend,
        relay_here(resolve(parse_address(backend.address)), pipes=0) as (address, relay),
        dial(address) as client,
    ):
        client.sendall(hello())
        with backend.accept() as server:
            sent: list[bytes] = []
            with together(lambda: sent.append(send_digest(client, 4_000_000, seed=3))):
                count, digest = receive_digest(server)
            assert (count, [digest]) == (4_000_000, sent)
            assert relay.pool.open == 0


def test_counters_add_up_and_forget_who() -> None:
    with (
        Backend("tcp:127.0.0.1:0") as backend,
        relay_here(resolve(parse_address(backend.address))) as (address, relay),
    ):
        for _ in range(3):
            with dial(address) as client:
                client.sendall(hello())
                with backend.accept() as server:
                    server.sendall(b"four")
                    assert client.recv(4) == b"four"
    counters = relay.counters
    assert counters.accepted == sum(counters.reasons.values()) == 3
    assert (counters.bytes_up, counters.bytes_down) == (3 * len(hello()), 12)
