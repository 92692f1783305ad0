"""NVIDIA's verifier kept warm for a benchmark: each line on stdin is one verdict, answered by its milliseconds.

Runs in `.venv-nvidia` only, never imported by ours.  python -I -B nvidia_peer.py NVIDIA_JUDGE.py JOB.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    spec = importlib.util.spec_from_file_location("nvidia_judge", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the verifier prints
    judge = module.Judge(json.loads(Path(sys.argv[2]).read_text()))
    for _ in sys.stdin:
        started = time.perf_counter()
        accepted = judge.verdict(judge.devices())
        spent = (time.perf_counter() - started) * 1000
        if not accepted:
            raise SystemExit(1)
        answers.write(f"{spent:.3f}\n")
        answers.flush()


if __name__ == "__main__":
    main()
