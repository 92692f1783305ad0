"""vLLM's own OpenAI app, mounted in this process behind our gateway: no socket, no port, no second HTTP server.

The engine core is a child process that holds weights and KV cache; HTTP, tokenizer and templates run here. We build
the command line, set the environment before the first import, lock both (`policy`), drive the app's lifespan, watch
the core, and see to it that no process is left. Everything vLLM-specific that differs between versions is the table
`profiles.PATHS`.

Traps of the mount, each seen once: a mounted app's lifespan does not run by itself; its error handler wants
`app.state.server`; nothing notices a dead core unless somebody asks; importing the server touches root logging.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from argparse import Namespace
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from enclave import telemetry
from enclave.engine import policy, processes, selftest
from enclave.engine.base import ASGIApp, EngineError, Model, Task
from enclave.engine.child import FACTORY, FRONT
from enclave.engine.profiles import PATHS, Profile, argv, environment

__all__ = ["VllmEngine"]

POLL: Final = 0.5
"""Seconds between looks at the engine core."""
PATIENCE: Final = 10.0
"""Seconds the engine's children get to end by themselves."""


class _Server:
    """Stands where vLLM expects its uvicorn server: setting `should_exit` is its way to say that the engine died."""

    def __init__(self) -> None:
        self.should_exit = False


class VllmEngine:
    """One model on one in-process vLLM. Implements `enclave.engine.base.Engine`. One that fails has failed for good."""

    retry_after = None

    def __init__(self, model: Model, profile: Profile, runtime: Path) -> None:
        self._model = model
        self._profile = profile
        self._runtime = runtime
        self._stack = AsyncExitStack()
        self._server = _Server()
        self._client: Any = None  # Any: vLLM's EngineClient, half private
        self._app: ASGIApp | None = None
        self._children: dict[int, str] = {}
        self._failed = asyncio.Event()
        self._reason = ""
        self._watch: asyncio.Task[None] | None = None

    @property
    def model_id(self) -> str:
        return self._model.id

    @property
    def task(self) -> Task:
        return self._model.task

    @property
    def app(self) -> ASGIApp:
        if self._app is None:
            raise RuntimeError("the engine is not started")
        return self._app

    @property
    def healthy(self) -> bool:
        return self._app is not None and not self._failed.is_set()

    @property
    def children(self) -> dict[int, str]:
        """pid → start time of the processes the engine started."""
        return dict(self._children)

    async def start(self) -> None:
        begun = time.monotonic()
        policy.check_model(self._model.path)
        version = policy.installed_version(self._profile)
        self._prepare()
        before = processes.descendants()
        sealed = telemetry.is_sealed()
        # Children inherit stdout and stderr: from here on these pass only telemetry's own lines.
        telemetry.seal()
        try:
            await self._mount(version)
        except BaseException as err:
            self._children = _new(before)
            await self._clear()
            if isinstance(err, EngineError) or not isinstance(err, Exception):
                raise
            raise EngineError(
                "ENGINE_START",
                f"vLLM could not start the model: {type(err).__name__}: {str(err)[:300]}".replace("\n", " "),
                hint="the library lines of the log name the place; check the model directory and free memory",
            ) from err
        finally:
            if not sealed:
                telemetry.unseal()
        self._children = _new(before)
        self._watch = asyncio.create_task(self._look())
        milliseconds = round((time.monotonic() - begun) * 1000)
        telemetry.event(
            "engine.started", model=self.model_id, profile=self._profile.name, version=version, ms=milliseconds
        )

    def _prepare(self) -> None:
        """Directories, logging configuration and environment, all before vLLM is imported."""
        wanted = environment(self._profile, self._runtime)
        policy.check_environment(os.environ, wanted)
        if "vllm" in sys.modules and any(os.environ.get(k) != v for k, v in wanted.items()):
            raise EngineError("ENGINE_LATE", "vLLM was imported before its environment was set")
        for name in ("cache", "config", "rpc"):
            (self._runtime / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._runtime / "config" / "do_not_track").touch()
        telemetry.configure_libraries(self._runtime / "logging.json", FACTORY)
        self._purge()
        policy.set_environment({**wanted, FRONT: str(os.getpid())})

    def _purge(self) -> None:
        """Remove the sockets that a killed predecessor left."""
        for socket in (self._runtime / "rpc").iterdir():
            socket.unlink(missing_ok=True)

    async def _mount(self, version: str) -> None:
        paths = PATHS[version]

        def of(name: str) -> Any:  # Any: functions of a library without stable types
            return getattr(importlib.import_module(paths[name]), name)

        parser = of("make_arg_parser")(of("FlexibleArgumentParser")())
        args: Namespace = parser.parse_args(argv(self._profile, self._model))
        of("validate_parsed_serve_args")(args)
        policy.check_arguments(vars(args), self.task)
        if importlib.import_module("vllm.usage.usage_lib").is_usage_stats_enabled():
            raise EngineError("ENGINE_POLICY", "vLLM would send usage statistics")

        self._client = await self._stack.enter_async_context(of("build_async_engine_client")(args))
        tasks = await self._client.get_supported_tasks()
        inner = of("build_app")(args, tasks, self._client.model_config)
        await of("init_app_state")(self._client, inner.state, args, tasks)
        inner.state.server = self._server
        await self._stack.enter_async_context(inner.router.lifespan_context(inner))
        # Importing the server may have put handlers of its own on the root logger.
        telemetry.configure_libraries()
        self._app = inner

    async def _look(self) -> None:
        """Notice that the core is gone: nothing else in a mounted vLLM would."""
        while not self._failed.is_set():
            await asyncio.sleep(POLL)
            if self._client.errored or self._server.should_exit:
                self._fail("engine-died")
            elif len(processes.alive(self._children)) < len(self._children):
                self._fail("child-died")

    def _fail(self, reason: str) -> None:
        self._reason = reason
        self._failed.set()
        telemetry.event("engine.failed", model=self.model_id, reason=reason)

    async def self_test(self, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
        await selftest.run(self, golden)

    async def wait_failed(self) -> str:
        await self._failed.wait()
        return self._reason

    async def stop(self) -> None:
        if self._app is None:
            return
        begun = time.monotonic()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        killed = await self._clear()
        telemetry.event(
            "engine.stopped", model=self.model_id, killed=killed, ms=round((time.monotonic() - begun) * 1000)
        )

    async def _clear(self) -> int:
        """Leave the engine's contexts, then make sure by pid that no child outlives us."""
        self._app = None
        try:
            await self._stack.aclose()
        except Exception as err:  # whatever vLLM raises here, its children must still be ended
            telemetry.event("uncaught", error=type(err).__name__)
        self._client = None
        killed = await processes.end(self._children, patience=PATIENCE)
        self._purge()
        return killed


def _new(before: dict[int, str]) -> dict[int, str]:
    """Processes below us that were not there before, less multiprocessing's resource tracker.

    The tracker holds no content, serves this process as a whole, and ends with it."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker = getattr(getattr(module, "_resource_tracker", None), "_pid", None)
    return {pid: start for pid, start in processes.descendants().items() if pid not in before and pid != tracker}
