"""`vouchsafe-host`: the commands of the machine's owner.

Each command imports its own part only when it is called, so that a relay process loads nothing but the relay.
What goes wrong is one `error:` line and one `hint:` line on standard error; exit status 2 for a command line
that cannot mean anything, 1 when the machine refuses.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path
from typing import NoReturn

from host.errors import HostError, RunError, UsageError

__all__ = ["main"]

_PIPES = 256


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError("BAD_COMMAND_LINE", message, f"see `{self.prog} --help`")


def _build_parser() -> argparse.ArgumentParser:
    from host.limits import Limits

    limits = Limits()
    parser = _Parser(prog="vouchsafe-host", description="Programs for the owner of the machine.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    relay = commands.add_parser(
        "relay",
        help="move ciphertext between clients and enclaves",
        description="Accept, read one TLS ClientHello, choose a backend by its server name, move bytes both ways. "
        "ADDRESS is tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:/absolute/path.",
        allow_abbrev=False,
    )
    relay.add_argument("--listen", action="append", required=True, metavar="ADDRESS", help="where to listen (repeat)")
    relay.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="backend for a server name; *.example.org stands for one label (repeat)",
    )
    relay.add_argument("--default", metavar="ADDRESS", help="backend for every other name, and for no name")
    for field, what in {
        "hello_timeout": "to a complete ClientHello",
        "dial_timeout": "to reach a backend",
        "idle_timeout": "without a byte in either direction",
        "half_close_timeout": "without a byte, once one direction has ended",
        "drain_timeout": "for open connections when stopping",
    }.items():
        default = getattr(limits, field)
        flag = "--" + field.replace("_", "-")
        relay.add_argument(flag, type=float, default=default, metavar="S", help=f"seconds {what} (default {default:g})")
    relay.add_argument("--max-connections", type=int, metavar="N", help=f"default {limits.max_connections}")
    relay.add_argument(
        "--max-per-source",
        type=int,
        default=limits.max_per_source,
        metavar="N",
        help=f"per IPv4 address or IPv6 /64 (default {limits.max_per_source})",
    )
    relay.add_argument("--quiet", action="store_true", help="no line per connection")
    return parser


def _max_connections(asked: int | None, default: int) -> int:
    """How many connections the descriptor limit allows: raised as far as it goes, then `default` shrinks to
    fit.
    """
    from host.limits import connections_within, descriptors_needed

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fitting = connections_within(hard, _PIPES) if hard != resource.RLIM_INFINITY else (asked or default)
    if asked is None and fitting >= 1:
        return min(default, fitting)
    if asked is None or asked > fitting:
        wanted = asked or 1
        raise RunError(
            "DESCRIPTOR_LIMIT",
            f"{wanted} connections need {descriptors_needed(wanted, _PIPES)} descriptors, the limit is {hard}",
            "raise it (ulimit -Hn, LimitNOFILE=), or lower --max-connections",
        )
    return asked


def _relay(options: argparse.Namespace) -> int:
    from host.address import parse_address, resolve
    from host.limits import Limits
    from host.listen import Listener, open_listener
    from host.relay import Relay
    from host.routes import RouteTable, parse_route

    names = ("hello_timeout", "dial_timeout", "idle_timeout", "half_close_timeout", "drain_timeout", "max_per_source")
    chosen = {name: getattr(options, name) for name in names}
    _keep_standard_streams()
    # First everything the command line alone can get wrong (status 2), then everything the machine can refuse
    # (status 1).
    Limits(**chosen, **({} if options.max_connections is None else {"max_connections": options.max_connections}))
    addresses = [parse_address(text, listening=True) for text in options.listen]
    default = parse_address(options.default) if options.default is not None else None
    routes = RouteTable([parse_route(text) for text in options.route], default)
    limits = Limits(**chosen, max_connections=_max_connections(options.max_connections, Limits().max_connections))
    endpoints = {route.name: resolve(route.backend) for route in routes.routes}
    listeners: list[Listener] = []
    try:
        for address in addresses:
            listeners.append(open_listener(address))
    except HostError:
        for listener in listeners:
            listener.close()
        raise
    relay = Relay(listeners, routes, endpoints, limits, pipes=_PIPES, quiet=options.quiet)
    relay.stop_on_signals()
    for listener in listeners:
        _say(f"relay: listening on {listener.address}")
    relay.run()
    return 0


def _keep_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed: else a client's socket gets its number, and our log lines."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is `fd`


def _say(line: str) -> None:
    """A line on standard output; a reader that has gone is no reason to stop."""
    try:
        print(line, flush=True)
    except OSError:
        # Kept until exit, when the interpreter flushes it once more.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (the machine refused) or 2 (usage)."""
    try:
        options = _build_parser().parse_args(argv)
        return _relay(options)
    except HostError as err:
        print(f"error: {err}\nhint: {err.hint}", file=sys.stderr)
        return err.exit_status


if __name__ == "__main__":
    raise SystemExit(main())
