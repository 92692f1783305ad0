from __future__ import annotations

import pytest

from host.address import TcpAddress, UnixAddress, parse_address, resolve
from host.errors import RunError, UsageError
from host.routes import DEFAULT, RouteTable, parse_route

HERE = UnixAddress("/run/x.sock")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:127.0.0.1:8443", TcpAddress("127.0.0.1", 8443)),
        ("tcp:[::1]:1", TcpAddress("::1", 1)),
        ("tcp:enclave.internal:65535", TcpAddress("enclave.internal", 65535)),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
    ],
)
def test_address_reads_and_writes_the_same(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "127.0.0.1:8443", "tcp:", "tcp:127.0.0.1", "tcp::8443", "tcp:host:", "tcp:host:x", "tcp:host:-1",
        "tcp:h:65536", "tcp:h:0",
        "tcp:h:١", "tcp:h:000080", "tcp:::1:80", "tcp:[::1:80", "tcp:[nope]:80", "tcp:[127.0.0.1]:80",
        "tcp:a b:80",
        "unix:", "unix:x.sock", "unix:/a\0b", "unix:/" + "x" * 107, "vsock:3:8443", "TCP:h:1",
    ],
)  # fmt: skip
def test_bad_address_is_a_usage_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_address(text)
    assert refused.value.code == "BAD_ADDRESS"
    assert refused.value.hint


def test_port_zero_is_for_listening_only() -> None:
    assert parse_address("tcp:127.0.0.1:0", listening=True) == TcpAddress("127.0.0.1", 0)


def test_name_that_does_not_resolve_is_a_run_error() -> None:
    with pytest.raises(RunError, match="no such host"):
        resolve(TcpAddress("no-such-host.invalid", 1))


def test_literal_resolves_to_itself() -> None:
    assert [e.sockaddr for e in resolve(TcpAddress("127.0.0.1", 8))] == [("127.0.0.1", 8)]
    assert [e.sockaddr for e in resolve(HERE)] == ["/run/x.sock"]


def found(table: RouteTable, name: str | None) -> str | None:
    route = table.find(name)
    return route.name if route else None


def test_exact_name_beats_wildcard_beats_default() -> None:
    table = RouteTable([parse_route("a.example.org=unix:/a"), parse_route("*.example.org=unix:/b")], HERE)
    assert found(table, "a.example.org") == "a.example.org"
    assert found(table, "b.example.org") == "*.example.org"
    assert found(table, "other.test") == DEFAULT
    assert found(table, None) == DEFAULT


def test_wildcard_stands_for_exactly_one_label() -> None:
    table = RouteTable([parse_route("*.example.org=unix:/b")])
    assert found(table, "a.example.org") == "*.example.org"
    for name in ("example.org", "b.a.example.org", "aexample.org", "org"):
        assert found(table, name) is None


def test_without_a_default_unknown_and_missing_names_lead_nowhere() -> None:
    table = RouteTable([parse_route("a.test=unix:/a")])
    assert found(table, "b.test") is None
    assert found(table, None) is None


def test_route_name_is_compared_in_lower_case() -> None:
    assert parse_route("Demo.Test=unix:/a").name == "demo.test"


@pytest.mark.parametrize(
    "text", ["a.test", "=unix:/a", "a_b=unix:/a", "*=unix:/a", "a.*.test=unix:/a", "*.=unix:/a", "10.0.0.1=unix:/a"]
)
def test_bad_route_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_route(text)
    assert refused.value.code == "BAD_ROUTE"


def test_route_to_a_bad_address_names_the_address() -> None:
    with pytest.raises(UsageError, match="bad address 'x'"):
        parse_route("a.test=x")


def test_two_backends_for_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two routes"):
        RouteTable([parse_route("a.test=unix:/a"), parse_route("A.test=unix:/b")])


def test_table_without_any_route_is_refused() -> None:
    with pytest.raises(UsageError, match="no backend"):
        RouteTable([])
