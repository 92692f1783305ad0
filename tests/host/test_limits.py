from __future__ import annotations

import math

import pytest

from host.errors import UsageError
from host.limits import Admission, Limits, connections_within, descriptors_needed, source_key


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e9])
def test_time_that_bounds_nothing_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--hello-timeout"):
        Limits(hello_timeout=value)


@pytest.mark.parametrize("value", [0, -1, 10_000_000])
def test_count_that_bounds_nothing_is_refused(value: int) -> None:
    with pytest.raises(UsageError, match="--max-per-source"):
        Limits(max_per_source=value)


def test_source_cannot_take_more_than_its_share() -> None:
    admission = Admission(Limits(max_connections=5, max_per_source=2))
    assert [admission.enter("a") for _ in range(3)] == [None, None, "over-source-limit"]
    assert admission.enter("b") is None
    admission.leave("a")
    assert admission.enter("a") is None


def test_total_holds_for_sources_and_for_unix_peers() -> None:
    admission = Admission(Limits(max_connections=2, max_per_source=1))
    assert [admission.enter(None), admission.enter(None), admission.enter("a")] == [None, None, "over-capacity"]


def test_source_that_left_is_forgotten() -> None:
    admission = Admission(Limits())
    for _ in range(3):
        admission.enter("a")
    for _ in range(3):
        admission.leave("a")
    assert (admission.total, admission.sources) == (0, 0)


def test_refused_connection_is_not_counted() -> None:
    admission = Admission(Limits(max_per_source=1))
    admission.enter("a")
    admission.enter("a")
    admission.leave("a")
    assert (admission.total, admission.sources) == (0, 0)


def test_ipv6_addresses_of_one_network_are_one_source() -> None:
    assert source_key(("2001:db8:1:2::a", 1, 0, 0)) == source_key(("2001:db8:1:2:ffff::b", 9, 0, 0))
    assert source_key(("2001:db8:1:2::a", 1, 0, 0)) != source_key(("2001:db8:1:3::a", 1, 0, 0))
    assert source_key(("fe80::1%eth0", 1, 0, 2)) == source_key(("fe80::2%eth1", 1, 0, 3))
    assert source_key(("192.0.2.1", 1)) != source_key(("192.0.2.2", 1))
    assert source_key("") is source_key(b"") is source_key(()) is None


@pytest.mark.parametrize("descriptors", [1024, 20000, 1048576])
def test_connections_that_fit_need_no_more_than_there_is(descriptors: int) -> None:
    fitting = connections_within(descriptors, 256)
    assert descriptors - 2 < descriptors_needed(fitting, 256) <= descriptors
