"""`make bench`: what we promised about speed and size, measured beside the named peer in one run.

Writes `build/bench.json` ({"rows": [{name, ours, peer, peer_name, ratio, goal, holds}]}) and prints a table. Medians of
interleaved rounds. A missed goal is shown and makes the exit status 1 with --strict only: a busy machine is no bug.

    python -m tests.bench [--rounds N] [--strict]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

from tests.bench import gateway, gpu, handshake, process, proxy, tdx
from tests.bench.rows import Row, table
from tests.devtee.running import REPOSITORY


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each contestant (default 15)")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a goal was missed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"bench: {os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}", flush=True)
    rows: list[Row] = []
    for part in (tdx, gpu, process, handshake, proxy, gateway):
        rows += part.rows(max(options.rounds, 1))
    file = REPOSITORY / "build" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2) + "\n")
    print(table(rows))
    missed = sum(row.holds is False for row in rows)
    print(f"bench: {missed} of {sum(row.holds is not None for row in rows)} goals missed; rows in build/bench.json")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
