"""What a verifying process costs: memory at its peak, and the time until it can begin."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.rows import Row, at_most, fact
from tests.devtee.running import REPOSITORY
from tests.genuine import genuine

MEMORY = 100.0
IMPORT = 300.0
_VERIFY = """
import sys, time
from pathlib import Path
from attestation.bundle import Bundle
from attestation.policy import Policy
from attestation.verifier import verify
bundle, policy, now = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
started = time.perf_counter()
read = Bundle.decode(bundle.read_bytes())
result = verify(read.evidence, read.endorsements, Policy.parse(policy.read_text()), now=now, name=None)
spent = (time.perf_counter() - started) * 1000
assert result.accepted, result.codes
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024, spent)
"""
_IMPORT = """
import time
started, clock = time.process_time(), time.perf_counter()
import attestation.verifier
print((time.process_time() - started) * 1000, (time.perf_counter() - clock) * 1000)
"""


def rows(rounds: int) -> list[Row]:
    honest = genuine(gpus=tuple(range(8)))
    with tempfile.TemporaryDirectory(prefix="vouchsafe-bench-") as folder:
        bundle, policy = Path(folder) / "bundle", Path(folder) / "policy.toml"
        bundle.write_bytes(honest.bundle())
        policy.write_text(honest.policy_text)
        found = [_run(_VERIFY, str(bundle), str(policy), str(honest.now)) for _ in range(3)]
    imports = [_run(_IMPORT) for _ in range(max(7, rounds))]
    return [
        at_most("peak memory of a process that verifies a TD with 8 GPUs (MB)", max(f[0] for f in found), MEMORY, "MB"),
        fact("the same verification, all of it, nothing cached (ms)", statistics.median(f[1] for f in found)),
        at_most(
            "import attestation.verifier, fresh process (CPU ms)",
            statistics.median(i[0] for i in imports),
            IMPORT,
            "ms",
        ),
        fact("the same by the clock, whatever else this machine does (ms)", statistics.median(i[1] for i in imports)),
    ]


def _run(program: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [float(n) for n in done.stdout.split()]
