"""`python -m tests.enclave.echo_enclave --config F`: the real boot with the echo engine in place of vLLM.

For tests of everything around the engine. No configuration can ask for it: only this test program hands it in.
"""

from __future__ import annotations

import sys
from pathlib import Path

from enclave import boot
from enclave.engine import Engine
from enclave.engine.echo import EchoEngine
from enclave.settings import ModelSettings


def load(model: ModelSettings, runtime: Path) -> Engine:
    return EchoEngine(model.id)


if __name__ == "__main__":
    assert sys.argv[1] == "--config"
    sys.exit(boot.run(Path(sys.argv[2]), load_engine=load))
