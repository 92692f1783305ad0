"""`python -m tests.enclave.echo_enclave CONFIG [start-delay=S] [die-after=S] [start-fails] [process-fails] [child]`:
the real boot with the echo engine in place of vLLM, in process or in processes of its own as the configuration says.

For tests of everything around the engine. No configuration can ask for it: only this test program hands it in.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from enclave import boot
from enclave.engine import Engine, EngineError
from enclave.engine.echo import Call, EchoEngine
from enclave.engine.uds import ProcessEngine
from enclave.settings import ModelSettings


class Forgetful(list[Call]):
    """Nobody in another process can look at them, and a hundred thousand are asked of it."""

    def append(self, call: Call) -> None:
        return None


class Misbehaving(EchoEngine):
    """An echo that starts late, dies, or leaves a child, as the command line says."""

    def __init__(self, model_id: str, wishes: dict[str, str]) -> None:
        super().__init__(model_id)
        self.calls = Forgetful()
        self._wishes = wishes

    async def start(self) -> None:
        if "child" in self._wishes:
            subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)  # noqa: ASYNC220 - what an engine does
        await asyncio.sleep(float(self._wishes.get("start-delay", 0)))
        if "start-fails" in self._wishes:
            raise EngineError("ENGINE_START", "no such luck", hint="free some memory")
        await super().start()
        if "die-after" in self._wishes:
            asyncio.get_running_loop().call_later(float(self._wishes["die-after"]), self.die, "killed")


def main(argv: list[str]) -> int:
    wishes = {name: value for name, _, value in (wish.partition("=") for wish in argv[1:])}

    def load(model: ModelSettings, runtime: Path) -> Engine:
        if model.placement == "process":
            told = runtime / "wishes.json"
            told.write_text(json.dumps({"refuse": True} if "process-fails" in wishes else {}))
            program = (sys.executable, "-m", "tests.enclave.engine.echo_worker", str(told))
            return ProcessEngine(model, runtime, program=program)
        return Misbehaving(model.id, wishes)

    return boot.run(Path(argv[0]), load_engine=load)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
