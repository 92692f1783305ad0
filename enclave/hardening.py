"""What keeps plaintext and keys inside the process, as far as a process can see to it: applied at boot, checkable.

Runs in the enclave before any key exists, and on a laptop by `vouchsafe-enclave check`. `apply` sets what a process
may set for itself and reads it back; `check` looks at the whole list, the machine's part included. In the measured
image all of it holds by construction. Under a policy that is not marked `development` a boot requires all of it;
under a development policy what does not hold is said and passed over.

None of this stops the host: the TD does. It stops accidents that would carry memory out of the TD's encrypted memory
(swap, core dumps) or foreign code into it (preloading).
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from attestation.errors import InputError

__all__ = ["Measure", "apply", "check", "refuse_environment"]

PR_SET_DUMPABLE: Final = 4
PR_GET_DUMPABLE: Final = 3
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37

UMASK: Final = 0o077

INJECTING: Final = frozenset(
    {
        # the dynamic loader: foreign code in this process, or its memory map in a file
        "LD_PRELOAD", "LD_AUDIT", "LD_DEBUG", "LD_DEBUG_OUTPUT", "LD_PROFILE", "LD_PROFILE_OUTPUT", "GCONV_PATH",
        # the interpreter
        "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONBREAKPOINT", "PYTHONUSERBASE",
        "PYTHONPYCACHEPREFIX", "PYTHONPLATLIBDIR", "PYTHONEXECUTABLE", "PYTHONFAULTHANDLER", "PYTHONTRACEMALLOC",
        "PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONDUMPREFS", "PYTHONMALLOCSTATS",
        # OpenSSL: key logs, another configuration, loadable modules
        "SSLKEYLOGFILE", "OPENSSL_CONF", "OPENSSL_MODULES", "OPENSSL_ENGINES", "OPENSSL_TRACE",
    }
)  # fmt: skip
"""Variables that bring code in or carry secrets out. What the engine's library reads is the engine's list."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure: `pass`, `fail`, or `skip` with the reason. A skip is never a pass.

    essential   a boot refuses without it under every policy
    """

    id: str
    status: Literal["pass", "fail", "skip"]
    reason: str
    hint: str = ""
    essential: bool = False

    def as_json(self) -> dict[str, str]:
        return {"id": self.id, "status": self.status, "reason": self.reason, "hint": self.hint}


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Raises `InputError` when a variable is set that injects code or carries secrets out."""
    found = sorted(INJECTING & environment.keys())
    if found:
        raise InputError(
            "INPUT_ENVIRONMENT",
            f"the environment sets {', '.join(found)}",
            expected="none of the variables that inject code or write secrets",
            hint=f"start without it: env {' '.join(f'-u {name}' for name in found)} vouchsafe-enclave …",
        )


def apply() -> None:
    """Set what this process may set for itself. `check` reads it back; nothing here raises but for a broken kernel."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # Orphans of an engine come to us, so that the stop finds and ends them.
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.umask(UMASK)


def check(
    environment: Mapping[str, str] | None = None,
    *,
    directories: Mapping[str, Path] | None = None,
    proc: Path = Path("/proc"),
) -> list[Measure]:
    """Every measure as it stands now. *directories* are those of the configuration, by name."""
    env = os.environ if environment is None else environment
    found = [
        _core_limit(),
        _flag("dumpable", PR_GET_DUMPABLE, 0, "other processes of this user cannot read this one's memory"),
        _flag("no-new-privileges", PR_GET_NO_NEW_PRIVS, 1, "no program started from here gains privileges"),
        _flag("subreaper", PR_GET_CHILD_SUBREAPER, 1, "orphans of an engine are found and ended"),
        _umask(),
        _environment(env),
        _library_path(env),
        _swap(proc),
        _core_pattern(proc),
        _ptrace(proc),
        _user(),
        _tdx(proc),
    ]
    found += [_directory(name, path) for name, path in (directories or {}).items()]
    return found


def _core_limit() -> Measure:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    return _measure(
        "core-limit", limits == (0, 0), "no core dump of this process", f"limits are {limits}", essential=True
    )


def _flag(id: str, option: int, wanted: int, good: str) -> Measure:
    value = _prctl(option)
    return _measure(id, value == wanted, good, f"the flag is {value}", essential=True)


def _umask() -> Measure:
    value = os.umask(UMASK)
    os.umask(value)
    return _measure(
        "umask", value & UMASK == UMASK, "files are for this user alone", f"it is {value:03o}", essential=True
    )


def _environment(env: Mapping[str, str]) -> Measure:
    found = sorted(INJECTING & env.keys())
    return _measure(
        "environment", not found, "no variable injects code or writes secrets", f"set: {', '.join(found)}",
        hint="unset them", essential=True,
    )  # fmt: skip


def _library_path(env: Mapping[str, str]) -> Measure:
    # Not essential: the development TEE stands in for the GPU driver this way, and nothing else can.
    return _measure(
        "library-path", "LD_LIBRARY_PATH" not in env, "libraries come from the image", "LD_LIBRARY_PATH is set",
        hint="needed by the development TEE only",
    )  # fmt: skip


def _swap(proc: Path) -> Measure:
    text = _text(proc / "swaps")
    if text is None:
        return Measure("swap", "skip", "the list of swap areas cannot be read")
    areas = text.splitlines()[1:]
    return _measure("swap", not areas, "no memory reaches a disk", f"{len(areas)} swap areas", hint="swapoff -a")


def _core_pattern(proc: Path) -> Measure:
    text = _text(proc / "sys/kernel/core_pattern")
    if text is None:
        return Measure("core-pattern", "skip", "the core pattern cannot be read")
    # With a pipe the limit of zero does not hold (core(5)).
    return _measure(
        "core-pattern", not text.startswith("|") or text.strip() == "|/bin/false", "cores are piped to no program",
        "cores are piped to a program", hint="sysctl kernel.core_pattern=core",
    )  # fmt: skip


def _ptrace(proc: Path) -> Measure:
    text = _text(proc / "sys/kernel/yama/ptrace_scope")
    if text is None:
        return Measure("ptrace-scope", "skip", "this kernel has no Yama")
    return _measure(
        "ptrace-scope", text.strip() in ("1", "2", "3"), "only parents may trace", "anybody may trace",
        hint="sysctl kernel.yama.ptrace_scope=2",
    )  # fmt: skip


def _user() -> Measure:
    if os.geteuid() != 0:
        return Measure("user", "pass", f"runs as user {os.geteuid()}")
    return Measure("user", "skip", "runs as root: the event log and the GPU ready state ask for it in the guest")


def _tdx(proc: Path) -> Measure:
    text = _text(proc / "cpuinfo") or ""
    if "tdx_guest" in text:
        return Measure("tdx-guest", "pass", "the kernel says that this is a TDX guest")
    return Measure("tdx-guest", "skip", "this is no TDX guest: a development machine")


def _directory(name: str, path: Path) -> Measure:
    return _measure(
        f"directory-{name}", path.is_dir(), f"{path} is there", f"{path} is missing", hint="see docs/operate.md"
    )


def _measure(id: str, holds: bool, good: str, bad: str, *, hint: str = "", essential: bool = False) -> Measure:
    if holds:
        return Measure(id, "pass", good, essential=essential)
    return Measure(id, "fail", bad, hint, essential)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _prctl(option: int, value: int = 0) -> int:
    """prctl(2). Options that report through a pointer are read through one."""
    libc = ctypes.CDLL(None, use_errno=True)
    call: Callable[..., int] = libc.prctl
    zero = ctypes.c_ulong(0)
    if option == PR_GET_CHILD_SUBREAPER:
        answer = ctypes.c_int(0)
        result = call(option, ctypes.byref(answer), zero, zero, zero)
        return answer.value if result == 0 else -1
    result = call(option, ctypes.c_ulong(value), zero, zero, zero)
    if result < 0 and option in (PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
