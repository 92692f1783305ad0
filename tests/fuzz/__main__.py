"""Coverage-guided fuzzing of every parser that reads bytes from the other side (`targets`), with atheris.

    python -m tests.fuzz [TARGET …] [--seconds N] [--keep DIR] [--runs N] [--jobs N]   exit 1: something was found
    python -m tests.fuzz TARGET --input FILE                                  one input again, with its traceback

A failure is: an exception that is not the package's own, a broken promise of the target, an input that takes longer
than SECONDS_PER_INPUT, a process that grows beyond MEMORY_MB. Each target runs in a process of its own, forked after
the package was instrumented and the seeds were made. Inputs that fail lie in build/fuzz.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-untyped]  # ships no types

SECONDS_PER_INPUT = 5
MEMORY_MB = 400
FOUND = Path(__file__).resolve().parents[2] / "build" / "fuzz"


@dataclass(frozen=True)
class Limit:
    """When to stop one target: after so many seconds or inputs (-1: any number), or one input of so many seconds."""

    seconds: int
    runs: int = -1
    input: int = SECONDS_PER_INPUT
    found: Path = FOUND
    """Where inputs that fail are left."""


def main() -> int:
    options = _options()
    with redirect_stderr(StringIO()), atheris.instrument_imports(include=["attestation", "host"]):
        from tests.fuzz.targets import TARGETS
    names = options.targets or list(TARGETS)
    unknown = sorted({*names} - TARGETS.keys())
    if unknown:
        print(f"error: no target {', '.join(unknown)}\nhint: there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if options.input:
        for name in names:
            TARGETS[name](Path(options.input).read_bytes())
        print("fuzz: nothing wrong with this input")
        return 0
    limit = Limit(options.seconds, options.runs)
    failed = fuzz({name: TARGETS[name] for name in names}, limit, jobs=options.jobs, keep=options.keep)
    print(f"fuzz: {len(names) - len(failed)} of {len(names)} targets stood; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="per target (default 60)")
    parser.add_argument("--runs", type=int, default=-1, metavar="N", help="inputs per target (default any number)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="targets at the same time (default 1)")
    parser.add_argument("--keep", metavar="DIR", help="keep what was found interesting here, and begin with it")
    parser.add_argument("--input", metavar="FILE", help="run one input instead")
    return parser.parse_args()


def fuzz(targets: Mapping[str, Any], limit: Limit, *, jobs: int, keep: str | None = None) -> list[str]:
    """Run every target in a child of its own, *jobs* at a time; names of those that failed.

    Any: a `Target`, imported instrumented."""
    waiting = [(name, target, target.seeds()) for name, target in targets.items()]
    running: dict[int, tuple[str, float, Path]] = {}
    failed = []
    limit.found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vouchsafe-fuzz-") as folder:
        while waiting or running:
            while waiting and len(running) < max(jobs, 1):
                name, target, seeds = waiting.pop(0)
                log = Path(folder) / f"{name}.log"
                corpus = Path(keep) / name if keep else Path(folder) / f"{name}-corpus"
                child = _start(name, target, seeds, log, corpus, limit)
                running[child] = name, time.monotonic(), log
            pid, status = os.wait()
            name, started, log = running.pop(pid)
            text = log.read_text(errors="replace")
            good = os.waitstatus_to_exitcode(status) == 0
            took = time.monotonic() - started
            print(f"{'ok  ' if good else 'FAIL'}  {name:22} {took:4.0f} s  {_summary(text)}", flush=True)
            if not good:
                failed.append(name)
                print(text[-4000:], file=sys.stderr)
    return failed


def _start(name: str, target: Any, seeds: list[bytes], log: Path, corpus: Path, limit: Limit) -> int:  # Any: Target
    """Fork; the child becomes libFuzzer and never returns."""
    pid = os.fork()
    if pid:
        return pid
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        honest = log.with_suffix(".seeds")
        for path in (corpus, honest):
            path.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (honest / f"{number:03}").write_bytes(seed)
        arguments = [
            "fuzz", f"-max_total_time={limit.seconds}", f"-runs={limit.runs}", f"-timeout={limit.input}",
            f"-rss_limit_mb={MEMORY_MB}", f"-max_len={target.size}", f"-artifact_prefix={limit.found}/{name}-",
            "-print_final_stats=1", str(corpus), str(honest),
        ]  # fmt: skip

        def kept(data: bytes) -> None:
            try:
                target(data)
            except BaseException:
                (limit.found / f"{name}-crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
                raise

        atheris.Setup(arguments, kept)
        atheris.Fuzz()
    finally:
        os._exit(1)


def _summary(text: str) -> str:
    stats = dict(line.removeprefix("stat::").split(":", 1) for line in text.splitlines() if line.startswith("stat::"))
    runs, peak = stats.get("number_of_executed_units", "?").strip(), stats.get("peak_rss_mb", "?").strip()
    covered = re.findall(r" cov: (\d+) ", text)[-1:] or ["?"]
    return f"{runs} inputs, {covered[0]} edges, peak {peak} MB"


if __name__ == "__main__":
    sys.exit(main())
