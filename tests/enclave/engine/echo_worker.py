"""`python -m tests.enclave.engine.echo_worker WISHES …`: the real worker with the echo engine in place of vLLM.

WISHES is a JSON file, read anew at every request: `delay`, `fault`, `repeat` as in `EchoEngine`; `say` instead of the
prompt; `refuse`, `exit` or be `slow` (seconds) at the start; `die`, `print`, `child`. What happens is written beside
it: `.started`, `.asked` when a request comes, `.calls` when it is over, `.sent` while it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enclave.engine import worker
from enclave.engine.base import EngineError, Message, Receive, Scope, Send, Task
from enclave.engine.echo import EchoEngine


class WishedEngine(EchoEngine):
    def __init__(self, model_id: str, task: Task, wishes: Path) -> None:
        super().__init__(model_id, task)
        self._wishes = wishes

    def _wish(self) -> dict[str, Any]:
        wishes: dict[str, Any] = json.loads(self._wishes.read_text())
        self.delay, self.fault = wishes.get("delay", 0), wishes.get("fault", "")
        self.repeat = wishes.get("repeat", 1)
        return wishes

    def _write(self, suffix: str, document: Any) -> None:
        with self._wishes.with_suffix(suffix).open("a") as file:
            file.write(json.dumps(document) + "\n")

    async def start(self) -> None:
        wishes = self._wish()
        begun = time.monotonic()
        await asyncio.sleep(wishes.get("slow", 0))
        at = [begun, time.monotonic()]
        self._write(".started", {"at": at, "environment": sorted(os.environ)})
        if "exit" in wishes:
            os._exit(3)
        if "refuse" in wishes:
            raise EngineError("ENGINE_MEMORY", "no such luck", expected="more", actual="less", hint="free some")
        if "child" in wishes:
            subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)  # noqa: ASYNC220 - what an engine does
        await super().start()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        wishes = self._wish()
        self._write(".asked", scope["path"])
        if "print" in wishes:
            print(wishes["print"], flush=True)
            print(wishes["print"], file=sys.stderr, flush=True)
        if "die" in wishes:
            self.die("core-died")
        sent = 0

        async def counted(message: Message) -> None:
            nonlocal sent
            if "say" in wishes and message.get("body"):
                message["body"] = message["body"].replace(b"one", wishes["say"].encode())
                message.pop("headers", None)
            await send(message)
            sent += len(message.get("body", b""))
            self._wishes.with_suffix(".sent").write_text(str(sent))

        await super()._serve(scope, receive, counted)
        call = self.calls.pop()
        self._write(".calls", {"path": call.path, "gone": call.disconnected, "finished": call.finished})


def main(argv: Sequence[str]) -> int:
    wishes = Path(argv[0])
    return worker.run(argv[1:], lambda started: WishedEngine(started.id, started.task, wishes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
