"""The one door to the log. Everything the enclave says to its host passes here, and nothing else gets out.

An event is a registered name with registered fields; a field is an integer, a boolean, or a short string of a safe
alphabet that its table row allows. Whatever does not fit is dropped and counted, so that no prompt, answer, key or
exception text can reach the log by mistake: the sink decides, not the caller. Libraries log through `LibraryHandler`,
which keeps where a record was made (module and line, exception type) and never what it says: message templates of
libraries are not always templates.

`seal()` puts this process's stdout and stderr, and those of every child started later, on a pipe that lets through
only lines made here. Runs in the enclave and in the engine's child processes; the reader of the log is the host,
which is trusted with nothing.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

__all__ = ["LibraryHandler", "configure_libraries", "dropped", "event", "library_config", "seal", "unseal"]

_WORD: Final = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._:/+-]{0,127}")
_INT: Final = "int"
_BOOL: Final = "bool"
_SAFE: Final = "word"

EVENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "request": {
        "request_id": _SAFE,
        "route": _SAFE,
        "model": _SAFE,
        "status": _INT,
        "code": _SAFE,
        "outcome": _SAFE,
        "stream": _BOOL,
        "ms": _INT,
        "first_ms": _INT,
        "bytes_in": _INT,
        "bytes_out": _INT,
        "events": _INT,
        "receipt_id": _SAFE,
    },
    "boot.stage": {"number": _INT, "stage": _SAFE, "ms": _INT},
    "boot.failed": {"number": _INT, "stage": _SAFE, "code": _SAFE},
    "boot.ready": {"ms": _INT, "development": _BOOL},
    "hardening": {"measure": _SAFE, "holds": _BOOL},
    "certificate": {"not_before": _INT, "not_after": _INT, "keyset": _SAFE},
    "certificate.failed": {"code": _SAFE, "attempt": _INT, "left": _INT},
    "gpu.stopped": {"code": _SAFE, "done": _BOOL},
    "listen": {"address": _SAFE},
    "connection.refused": {"code": _SAFE},
    "state": {"state": _SAFE, "how": _SAFE, "code": _SAFE},
    "stop": {"reason": _SAFE, "ms": _INT},
    "engine.started": {"model": _SAFE, "profile": _SAFE, "version": _SAFE, "ms": _INT},
    "engine.failed": {"model": _SAFE, "reason": _SAFE},
    "engine.restart": {"model": _SAFE, "attempt": _INT, "ms": _INT},
    "engine.stopped": {"model": _SAFE, "killed": _INT, "ms": _INT},
    "library": {"logger": _SAFE, "level": _SAFE, "line": _INT, "error": _SAFE, "at": _SAFE},
    "uncaught": {"error": _SAFE, "at": _SAFE},
    "dropped": {"lines": _INT},
}
"""Every event there is, with the kind of each field. A new field is a decision about what the host may learn."""

dropped: Final[Counter[str]] = Counter()
"""What the sink refused, by reason: `event`, `field`, `value`, `line`."""

_lock: Final = threading.Lock()
_out = 2
_sealed: _Seal | None = None


def event(name: str, **fields: int | str | bool | None) -> None:
    """Write one line of JSON. Fields that are None are left out; what the table does not allow is dropped."""
    line = _line(name, fields)
    if line is not None:
        _write(line)


def _line(name: str, fields: Mapping[str, object]) -> bytes | None:
    table = EVENTS.get(name)
    if table is None:
        dropped["event"] += 1
        return None
    kept: dict[str, object] = {"ts": round(time.time(), 3), "event": name}
    for key, value in fields.items():
        kind = table.get(key)
        if kind is None:
            dropped["field"] += 1
        elif value is None:
            continue
        elif _fits(value, kind):
            kept[key] = value
        else:
            dropped["value"] += 1
    return json.dumps(kept, separators=(",", ":")).encode("ascii") + b"\n"


def _fits(value: object, kind: str) -> bool:
    if kind == _BOOL:
        return isinstance(value, bool)
    if kind == _INT:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _write(line: bytes) -> None:
    with _lock:
        try:
            os.write(_out, line)
        except OSError:  # the host took its end of the log away: serving goes on without it
            dropped["line"] += 1


# --- libraries --------------------------------------------------------------------------------------------------------


class LibraryHandler(logging.Handler):
    """Say where a library logged, never what: level, logger, line, and type and place of an exception."""

    def emit(self, record: logging.LogRecord) -> None:
        error, at = _exception(record.exc_info)
        level, name = record.levelname, record.name
        event("library", logger=name or "root", level=level, line=record.lineno, error=error, at=at)


def library_config(factory: str = "enclave.telemetry.LibraryHandler") -> dict[str, Any]:  # Any: dictConfig's shape
    """A `logging.config` mapping that sends warnings and errors of every library to *factory* and nothing elsewhere."""
    quiet = {"level": "WARNING", "handlers": [], "propagate": True}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"telemetry": {"()": factory}},
        "root": {"level": "WARNING", "handlers": ["telemetry"]},
        "loggers": {name: dict(quiet) for name in ("vllm", "uvicorn", "uvicorn.access")},
    }


def configure_libraries(path: Path | None = None, factory: str = "enclave.telemetry.LibraryHandler") -> None:
    """Route all library logging of this process here; with *path*, write the same as JSON for child processes."""
    config = library_config(factory)
    if path is not None:
        path.write_text(json.dumps(config), encoding="ascii")
    logging.captureWarnings(True)
    logging.config.dictConfig(config)
    _take_over()


def _take_over() -> None:
    """Remove every handler that is not ours and let records rise to the root: importing a library may add one."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if not isinstance(handler, LibraryHandler | logging.NullHandler):
                logger.removeHandler(handler)
                logger.propagate = True


def _exception(info: object) -> tuple[str | None, str | None]:
    """Type name and innermost place (`file.py:line`) of an exception, without its text."""
    if not isinstance(info, tuple) or not isinstance(info[0], type):
        return None, None
    traceback = info[2]
    if not isinstance(traceback, TracebackType):
        return info[0].__name__, None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = Path(traceback.tb_frame.f_code.co_filename).name
    return info[0].__name__, f"{file}:{traceback.tb_lineno}"


# --- stdout and stderr ------------------------------------------------------------------------------------------------


class _Seal:
    """Descriptors 1 and 2 of this process, while they are replaced by the pipe."""

    def __init__(self) -> None:
        self.saved = (os.dup(1), os.dup(2))
        self.hooks = (sys.excepthook, sys.unraisablehook, threading.excepthook)
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        # Daemon: it lives until the last writer, a child perhaps, has gone.
        threading.Thread(target=_drain, args=(read,), name="telemetry", daemon=True).start()


def seal() -> None:
    """From now on stdout and stderr, ours and our children's, pass only lines made by this module. Idempotent."""
    global _out, _sealed
    if _sealed is not None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _sealed = _Seal()
    _out = _sealed.saved[1]
    sys.excepthook = lambda kind, value, tb: _uncaught((kind, value, tb))
    threading.excepthook = lambda args: _uncaught((args.exc_type, args.exc_value, args.exc_traceback))
    sys.unraisablehook = lambda args: _uncaught((args.exc_type, args.exc_value, args.exc_traceback))


def unseal() -> None:
    """Give stdout and stderr back to this process; children started under the seal keep the pipe."""
    global _out, _sealed
    if _sealed is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(_sealed.saved[0], 1)
    os.dup2(_sealed.saved[1], 2)
    sys.excepthook, sys.unraisablehook, threading.excepthook = _sealed.hooks
    _out = 2
    for descriptor in _sealed.saved:
        os.close(descriptor)
    _sealed = None


def is_sealed() -> bool:
    return _sealed is not None


def _uncaught(info: object) -> None:
    error, at = _exception(info)
    event("uncaught", error=error, at=at)


def _drain(read: int) -> None:
    """Pass on lines that this module could have made, bounded; count the rest."""
    with os.fdopen(read, "rb") as pipe:
        while line := pipe.readline(4096):
            made = _again(line)
            if made is None:
                dropped["line"] += 1
            else:
                _write(made)


def _again(line: bytes) -> bytes | None:
    """*line* rebuilt from the table when it is an event of ours, else None. A child's word is no better than a host's:
    only what the table allows is copied."""
    if not line.startswith(b'{"ts":') or not line.endswith(b"}\n"):
        return None
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    fields.pop("ts", None)
    name = fields.pop("event", None)
    return _line(name, fields) if name in ("library", "uncaught") else None
