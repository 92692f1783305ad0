"""`python -m tests.devtee --state DIR`: run a development TEE until SIGTERM or SIGINT.

Prints `devtee: ready DIR` on stdout once everything is there. Exit status: 0 stopped, 1 could not start, 2 usage.
`--set part.field=value` changes one field of `Behaviour` (quote, collateral, gpu, rim, ocsp) or of the TD (td):
numbers in any base, true and false, hex for bytes, commas for lists.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, get_type_hints

from tests.devtee.machine import Behaviour, Machine
from tests.devtee.tee import DevTee

_PARTS: Final = tuple(f.name for f in fields(Behaviour))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.devtee", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="state directory, made when absent")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in the machine, 1 to 8 (default 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="tell one lie, see the module's text"
    )
    parser.add_argument(
        "--follow-parent", action="store_true", help="stop when the process that started this one is gone"
    )
    options = parser.parse_args(argv)
    if not 1 <= options.gpus <= 8:
        parser.error("--gpus: 1 to 8")
    parent = os.getppid() if options.follow_parent else None
    stopping = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    state = options.state.resolve()
    try:
        tee = DevTee.open(state)
        behaviour = Behaviour()
        behaviour = replace(behaviour, gpu=replace(behaviour.gpu, gpus=options.gpus))
        for change in options.set:
            part, name, value = _split(change)
            if part == "td":
                tee.td = changed(tee.td, name, value)
            else:
                behaviour = replace(behaviour, **{part: changed(getattr(behaviour, part), name, value)})
    except (ValueError, KeyError) as err:
        print(f"devtee: cannot use {err}", file=sys.stderr)
        return 2
    except OSError as err:
        print(f"devtee: {err}", file=sys.stderr)
        return 1
    try:
        with Machine(state, tee, behaviour) as machine:
            print(f"devtee: ready {state}", flush=True)
            machine.run(lambda: stopping or (parent is not None and os.getppid() != parent))
    except (OSError, RuntimeError, ValueError) as err:
        print(f"devtee: {err}", file=sys.stderr)
        return 1
    return 0


def _split(change: str) -> tuple[str, str, str]:
    target, equals, value = change.partition("=")
    part, dot, name = target.partition(".")
    if not equals or not dot or part not in (*_PARTS, "td"):
        raise ValueError(f"--set wants PART.FIELD=VALUE with PART one of td, {', '.join(_PARTS)}; got {change}")
    return part, name, value


def changed(record: Any, path: str, text: str) -> Any:  # Any: a dataclass instance and the same again
    """*record* with the field at *path* (dots go into records inside) read from *text* by the field's type."""
    name, _, rest = path.partition(".")
    hints = get_type_hints(type(record))
    if name not in hints:
        raise ValueError(f"{type(record).__name__} has no field {name}; it has {', '.join(hints)}")
    if rest:
        inner = getattr(record, name)
        if not is_dataclass(inner):
            raise ValueError(f"{name} has no fields")
        return replace(record, **{name: changed(inner, rest, text)})
    return replace(record, **{name: _value(hints[name], text)})


def _value(hint: Any, text: str) -> object:  # Any: a type hint
    """*text* as the first of *hint*'s types that fits."""
    kind = str(hint)
    if "frozenset" in kind:
        return frozenset(t for t in text.split(",") if t)
    if "tuple[str" in kind:
        return tuple(t for t in text.split(",") if t)
    if "bool" in kind:
        return {"true": True, "false": False}[text]
    if "bytes" in kind and "tuple" not in kind:
        return bytes.fromhex(text)
    if "int" in kind or "Literal[4" in kind:
        return int(text, 0)
    if "str" in kind or "Literal" in kind:
        return text
    raise ValueError(f"a field of type {kind} cannot be set on the command line")


if __name__ == "__main__":
    sys.exit(main())
