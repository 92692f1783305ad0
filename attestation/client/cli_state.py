"""`vouchsafe bootstrap` and `unlock`: the operator's two moments at an enclave's state.

Both verify the service under a policy that pins the operator before a secret leaves this machine. Secrets come from
files or stdin and go to files that only their owner reads; none is printed, in no form.
"""

from __future__ import annotations

import os
import stat
import sys
from argparse import Namespace
from pathlib import Path
from typing import Final

from attestation.client.cli_common import ACCEPTED, emit, policy_of, read_file, say
from attestation.client.cli_service import _cache, _target
from attestation.client.session import AttestedSession
from attestation.errors import InputError, RefusedError
from attestation.operator_state import MAX_KEY_FILE, KeyFile, check_secret, new_secret, secret_digest

__all__ = ["bootstrap", "unlock"]

MAX_SECRET: Final = 1024


def bootstrap(options: Namespace) -> int:
    """Make a secret; or bring it to a new service and keep what it gives once."""
    if options.new_secret:
        return _new_secret(options)
    for name in ("target", "secret", "policy", "key", "admin_key"):
        if not getattr(options, name):
            word = "TARGET" if name == "target" else f"--{name.replace('_', '-')}"
            raise InputError("INPUT_USAGE", f"{word} is missing", hint="`vouchsafe bootstrap --help`")
    secret = _secret(options.secret)
    session = AttestedSession(_target(options), policy_of(options), cache_dir=_cache(options))
    from attestation.client.state import OperatorState

    operator = OperatorState(session)
    if (state := operator.state()) != "new":
        raise RefusedError(f"STATE_{state.upper()}", f"the state of the service is {state}, so it has been set up",
                           hint="`vouchsafe unlock` opens it with its key")  # fmt: skip
    places = [_Place(Path(options.key)), _Place(Path(options.admin_key))]  # before anything is given that is given once
    try:
        for place in places:
            place.take()
        born = operator.bootstrap(secret)
        places[0].fill(born.key_file.encode())
        places[1].fill(born.admin_key.encode("ascii") + b"\n")
    except BaseException:
        for place in places:
            place.give_up()
        raise
    if options.json:
        emit({"state": "open", "key": options.key, "admin_key": options.admin_key, "admin_key_id": born.admin_key_id})
    else:
        say(f"{session.target.origin}: the state is made and open")
        say(f"  {options.key}: the state key; without it the state cannot be opened after a reboot: keep two copies")
        say(f"  {options.admin_key}: the first admin key, {born.admin_key_id}")
        say("  next: a project and a key, see docs/operate.md; the bootstrap secret is of no more use")
    return ACCEPTED


def unlock(options: Namespace) -> int:
    """Hand the state key to a verified service; remember how far its state has come."""
    path = Path(options.key)
    _private(path)
    kept = KeyFile.decode(read_file(path, "key file", MAX_KEY_FILE))
    session = AttestedSession(_target(options), policy_of(options), cache_dir=_cache(options))
    if kept.target != session.target.origin:
        raise InputError(
            "INPUT_TARGET", "the key file is of another service", expected=kept.target, actual=session.target.origin
        )
    from attestation.client.state import OperatorState

    now = OperatorState(session).unlock(kept)
    _replace(path, now.encode())
    if options.json:
        emit({"state": "open", "checkpoint": now.checkpoint.seq, "before": kept.checkpoint.seq})
    else:
        say(f"{session.target.origin}: the state is open, {now.checkpoint.seq} records")
        say(f"  {path}: remembers them; a state that was set back behind them will be refused")
    return ACCEPTED


def _new_secret(options: Namespace) -> int:
    secret = new_secret()
    place = _Place(Path(options.new_secret))
    place.take()
    place.fill(secret.encode("ascii") + b"\n")
    digest = secret_digest(secret).hex()
    if options.json:
        emit({"secret": options.new_secret, "bootstrap_sha256": digest})
    else:
        say(f"{options.new_secret}: a new bootstrap secret; for the configuration of the enclave:")
        say()
        say("[access]")
        say(f'bootstrap-sha256 = "{digest}"')
    return ACCEPTED


def _secret(source: str) -> str:
    if source == "-":
        raw = sys.stdin.buffer.read(MAX_SECRET + 1)
    else:
        _private(Path(source))
        raw = read_file(source, "bootstrap secret", MAX_SECRET)
    return check_secret(raw.decode("ascii", "replace").removesuffix("\n").removesuffix("\r"))


def _private(path: Path) -> None:
    """As ssh is about its keys: a secret that others can read is none."""
    try:
        mode = path.stat().st_mode
    except OSError as err:
        raise InputError("INPUT_FILE", f"cannot read it: {err.strerror or err}", actual=str(path)) from err
    if stat.S_ISREG(mode) and mode & 0o077:
        raise InputError(
            "INPUT_FILE_MODE", "others can read this file", expected="mode 0600", actual=f"{mode & 0o777:04o}",
            hint=f"chmod 600 {path}",
        )  # fmt: skip


class _Place:
    """A file that is there, empty and private, before its content exists; removed again when there is none."""

    def __init__(self, path: Path) -> None:
        self._path, self._taken = path, False

    def take(self) -> None:
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as err:
            raise InputError(
                "INPUT_FILE", f"cannot make the file: {err.strerror or err}", actual=str(self._path),
                hint="name a file that is not there yet: nothing is ever written over",
            ) from err  # fmt: skip
        self._taken = True

    def fill(self, content: bytes) -> None:
        _replace(self._path, content)
        self._taken = False

    def give_up(self) -> None:
        if self._taken:
            self._path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """All of it or nothing, on disk when this returns, private."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as err:
        raise InputError("INPUT_FILE", f"cannot write the file: {err.strerror or err}", actual=str(path)) from err
