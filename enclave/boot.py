"""The boot: numbered stages from a measured configuration to an open port. A failure names its stage and stops it.

    1 configuration   read once; policy, statements and paths it names; the address is ours
    2 hardening       no dumps, no injected code, nothing printed but what telemetry allows
    3 gpu probe       the driver's word: confidential computing on, developer tools off, production, count
    4 weights         every model directory has the digest that the configuration names
    5 keys            born here
    6 gpu evidence    over a nonce from the TLS key; the enclave's own verification; only then the ready state
    7 rtmr3           release, configuration, weights, seal: nothing can be added unseen afterwards
    8 quote           over claims that commit to all of it
    9 certificate     verified by the enclave as a client would
    10 engine         started, and its stored answers come out as measured
    11 state          the storage answers, and says whether there is state
    12 listen

Runs in the enclave; owns the signals, the engines and the order of the end: refuse, drain, stop the engines, leave no
child. Whatever fails after the boot ends the whole process: what cannot be verified is not degraded, it is off. The one
exception is an engine in a process of its own: its model answers 503 until it has been started and tested again, and
the other models go on. An engine mounted in this process shares its fate.

Ready means: every stage has passed, so every configured engine has been healthy once; the operator has opened the
state, through the attested channel; the certificate is valid; at least one model can answer now. Until the state is
open, the enclave proves who it is and serves nothing else.

Exit status: 0 stopped in order, 1 a stage failed, 2 the operator's own input cannot be used, 3 an engine or the
server failed while serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, Final

from attestation.attester.gpu import GpuAttester
from attestation.attester.tdx import TdxAttester
from attestation.errors import InputError, PolicyError, RefusedError, VouchsafeError
from attestation.policy import Policy
from attestation.tdx import rtmr3_items
from enclave import engine as engines
from enclave import hardening, telemetry
from enclave.api.app import Gateway
from enclave.api.attestation import Attestation
from enclave.api.health import health_routes
from enclave.api.record import Execution
from enclave.boot_steps import children, gauges, give_gpus_back, seal
from enclave.channel import ChannelProver
from enclave.clock import Clock
from enclave.custody import Custody
from enclave.documents import read_statements
from enclave.engine import Engine, EngineError, processes
from enclave.inputs import appraisal_policy, golden_answers, own_runtime, private_directory
from enclave.issuer import DRAIN, Draft, Issuer
from enclave.keys import KeyRing
from enclave.metrics import METRICS_PATH, Metrics
from enclave.producer import Producer, Worker
from enclave.receipts import ReceiptStore
from enclave.server import EnclaveServer, address, bind, make_server
from enclave.settings import ModelSettings, Settings
from enclave.tenancy import Slots
from enclave.tls import Endpoint
from enclave.weights import file_list_digest

__all__ = ["STAGES", "Boot", "BootFailed", "Console", "run"]

STAGES: Final = (
    "configuration", "hardening", "gpu probe", "weights", "keys", "gpu evidence", "rtmr3", "quote", "certificate",
    "engine", "state", "listen",
)  # fmt: skip
STOP_DRAIN: Final = 30
"""Seconds that running answers get when the enclave is asked to stop."""
CHILD_PATIENCE: Final = 3.0
"""Seconds for children that an engine's own stop left behind, before they are killed."""

_WAITS: Final = {
    "new": "and waits for `vouchsafe bootstrap`: there is no state yet",
    "locked": "and waits for `vouchsafe unlock`: its state is locked",
    "open": "its state is open",
}

LoadEngine = Callable[[ModelSettings, Path], Engine]


class BootFailed(Exception):
    """A stage failed. `error` says why and what to do."""

    def __init__(self, number: int, error: VouchsafeError) -> None:
        self.number, self.error = number, error
        super().__init__(f"boot stage {number} {STAGES[number - 1]}: {error}")


class Console:
    """Lines for whoever starts the enclave, on the stdout it was started with. Never content."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = os.dup(descriptor)  # stdout itself is sealed at stage 2

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads: the boot goes on
            os.write(self._descriptor, (" ".join(line.split()) + "\n").encode())


class Boot:
    """What has been made so far, and how it is taken down again. One per process."""

    def __init__(self, config: Path, console: Console, load_engine: LoadEngine) -> None:
        self._config, self._console, self._load_engine = config, console, load_engine
        self._begun = time.monotonic()
        self.clock = Clock()
        self.serving = False
        self.settings: Settings
        self.policy: Policy
        self.producer: Producer | None = None
        self.issuer: Issuer
        self.engines: dict[str, Engine] = {}
        self.custody: Custody | None = None
        self.prover: ChannelProver | None = None
        self.server: EnclaveServer | None = None
        self.serve_task: asyncio.Task[None] | None = None
        self.renew_task: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self._lock: IO[str] | None = None
        self._draft: Draft
        self._release: bytes
        self._files = Worker("weights")

    def ready(self) -> bool:
        """True after every stage, while the state is open, the certificate is valid, a model can answer and nothing
        has to stop."""
        is_open = self.custody is not None and self.custody.tenancy is not None
        return self.serving and is_open and self.issuer.valid and any(e.healthy for e in self.engines.values())

    async def up(self) -> None:
        """All stages. Raises `BootFailed`."""
        steps: tuple[Callable[[], Awaitable[str]], ...] = (
            self._configuration, self._hardening, self._gpu_probe, self._weights, self._keys, self._gpu_evidence,
            self._rtmr3, self._quote, self._certificate, self._engine, self._state, self._listen,
        )  # fmt: skip
        for number, (name, step) in enumerate(zip(STAGES, steps, strict=True), 1):
            begun = time.monotonic()
            try:
                detail = await step()
            except VouchsafeError as err:
                raise BootFailed(number, err) from err
            except Exception as err:
                fault = VouchsafeError("BOOT_INTERNAL", f"{type(err).__name__}: {' '.join(str(err).split())[:200]}")
                raise BootFailed(number, fault) from err
            seconds = time.monotonic() - begun
            telemetry.event("boot.stage", number=number, stage=name.replace(" ", "-"), ms=round(seconds * 1000))
            self._console.say(
                f"boot {number}/{len(STAGES)} {name}: ok ({seconds:.1f} s){f' {detail}' if detail else ''}"
            )
        self.serving = True
        telemetry.event(
            "boot.ready", ms=round((time.monotonic() - self._begun) * 1000), development=self.policy.development
        )

    # --- stages -------------------------------------------------------------------------------------------------------

    async def _configuration(self) -> str:
        self.settings = settings = Settings.load(self._config)
        self.policy = appraisal_policy(settings)
        self._release = read_statements(settings.paths.statements).release
        self._lock = own_runtime(settings.paths.runtime)
        self._socket = bind(settings.listen)
        return f"sha256 {settings.digest.hex()[:16]}…{', DEVELOPMENT policy' if self.policy.development else ''}"

    async def _hardening(self) -> str:
        hardening.refuse_environment(os.environ)
        hardening.apply()
        telemetry.configure_libraries()
        telemetry.seal()
        measures = hardening.check()
        failed = [m for m in measures if m.status == "fail"]
        for measure in measures:
            if measure.status != "skip":
                telemetry.event("hardening", measure=measure.id, holds=measure.status == "pass")
        hard = [m for m in failed if m.essential or not self.policy.development]
        if hard:
            raise RefusedError(
                "BOOT_HARDENING", f"{hard[0].id} does not hold: {hard[0].reason}", hint=hard[0].hint or "see `check`"
            )
        return f"not held here: {', '.join(m.id for m in failed)}" if failed else ""

    async def _gpu_probe(self) -> str:
        paths, wanted = self.settings.paths, self.settings.gpu
        tdx = TdxAttester(paths.tsm, paths.measurements, paths.acpi)
        self.producer = Producer(tdx, GpuAttester(pci=paths.pci) if wanted.count else None)
        if not wanted.count:
            return "none configured"
        state = await self.producer.gpu_state()
        seen = (state.count, state.switches, state.cc, state.production, state.dev_tools)
        if seen != (wanted.count, wanted.switches, True, True, False):
            raise RefusedError(
                "BOOT_GPU_STATE",
                "the GPUs are not what the configuration asks for",
                expected=f"{wanted.count} GPUs, {wanted.switches} switches, CC on, production, developer tools off",
                actual=f"{state.count} GPUs, {state.switches} switches, cc={state.cc}, production={state.production}, "
                f"dev_tools={state.dev_tools}",
                hint="nvidia-smi conf-compute -f shows the mode; correct [gpu] in the configuration for another count",
            )
        return f"{state.count} GPUs, {state.switches} switches, mode {state.mode}"

    async def _weights(self) -> str:
        for model in self.settings.models:
            found = await self._files.run(lambda path=model.path: file_list_digest(path))  # type: ignore[misc]  # bound now
            if found != model.weights:
                raise RefusedError(
                    "BOOT_WEIGHTS",
                    f"the files of model {model.id} are not those of the configuration",
                    expected=model.weights,
                    actual=found,
                    hint="restore the directory, or measure it anew and have the operator sign the new configuration",
                )
        return ", ".join(m.id for m in self.settings.models)

    async def _keys(self) -> str:
        assert self.producer is not None
        self.issuer = Issuer(self.settings, self.policy, KeyRing(), self.producer, self.clock, say=self._console.say)
        self.issuer.release_digest = self._release
        return ""

    async def _gpu_evidence(self) -> str:
        self._draft = await self.issuer.prepare()
        return "" if self._draft.gpu is not None else "none configured"

    async def _rtmr3(self) -> str:
        assert self.producer is not None
        weights = [(m.id, m.weights) for m in self.settings.models]
        items = rtmr3_items(self._release, self.settings.digest, weights)
        self.issuer.event_log = await self.producer.tdx(lambda tdx: seal(tdx, items))
        return f"{len(items)} items"

    async def _quote(self) -> str:
        await self.issuer.quote(self._draft)
        return ""

    async def _certificate(self) -> str:
        identity = self.issuer.certify(self._draft)
        self.issuer.publish(identity)
        del self._draft
        self.renew_task = asyncio.create_task(self.issuer.renew_forever())
        return f"{len(identity.leaf)} bytes, keyset {identity.keyset_digest[:23]}…"

    async def _engine(self) -> str:
        engines.sweep(self.settings.models)
        # One after another: an engine that starts measures the free memory, and another must not change it meanwhile.
        for index, model in enumerate(self.settings.models):
            self._console.say(
                f"boot 10/{len(STAGES)} engine: starting {model.id} (profile {model.profile}, {model.placement})"
            )
            golden = golden_answers(model.golden) if model.golden is not None else None
            engine = self._load_engine(model, private_directory(self.settings.paths.runtime / f"engine-{index}"))
            self.engines[model.id] = engine  # before its start: what has begun is stopped
            try:
                await engine.start()
                if golden is not None:
                    await engine.self_test(golden)
            except VouchsafeError as err:
                raise EngineError(
                    err.code, f"model {model.id}: {err.reason}", expected=err.expected, actual=err.actual, hint=err.hint
                ) from err
        tested = sum(m.golden is not None for m in self.settings.models)
        return f"{len(self.engines)} started, {tested} self-tested"

    async def _state(self) -> str:
        s = self.settings
        slots = {m.id: Slots(engines.slots(m), m.max_model_len) for m in s.models}
        self.custody = Custody(
            s.state.url, s.access.bootstrap_sha256, s.prices, slots, self.clock.now, opened=self._opened
        )
        return await self.custody.look()

    def _opened(self) -> None:
        self._console.say(f"enclave: ready on {self.address}")

    async def _listen(self) -> str:
        assert self.producer is not None and self._socket is not None and self.custody is not None
        self.prover = ChannelProver(self.producer)
        evidence = Attestation(self.issuer.bundle, self.producer, self.prover)
        health = health_routes(self.ready, lambda: bool(self.issuer.failing), self._states, lambda: self.custody_state)
        release = f"sha256:{self._release.hex()}"
        models = Metrics({m.id: m.task for m in self.settings.models})
        metrics = gauges(models, self.engines, self.custody, self.issuer)
        app = Gateway(
            engines=self.engines,
            executions={m.id: Execution(m.weights, release) for m in self.settings.models},
            custody=self.custody,
            receipts=ReceiptStore(),
            public={**evidence.routes, **health, ("GET", METRICS_PATH): metrics.app},
            ready=self.ready,
            metrics=metrics,
        )
        endpoint = Endpoint(
            lambda: self.issuer.current,
            self.clock.now,
            drain_s=DRAIN,
            failed=lambda: telemetry.event("uncaught", error="application"),
        )
        self.server = make_server(app, endpoint, drain_s=STOP_DRAIN)
        self.serve_task = asyncio.create_task(self.server.serve(sockets=[self._socket]))
        while not self.server.started:
            if self.serve_task.done():
                await self.serve_task
                raise RefusedError("BOOT_LISTEN", "the server ended before it listened")
            await asyncio.sleep(0.01)
        telemetry.event("listen", address=self.settings.listen.kind)
        return str(self.address)

    @property
    def custody_state(self) -> str:
        return "new" if self.custody is None else self.custody.state

    def _states(self) -> dict[str, bool]:
        return {id: engine.healthy for id, engine in self.engines.items()}

    @property
    def address(self) -> str:
        assert self._socket is not None
        return address(self.settings.listen, self._socket)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def failure(self) -> str:
        """Returns, with the reason, when something fails while serving. Cancelled at an orderly stop."""
        assert self.serve_task is not None and self.renew_task is not None and self.custody is not None
        watched: dict[asyncio.Task[Any], str] = {
            self.serve_task: "the server ended",
            self.renew_task: "the renewal of certificates ended",
        }
        waits = {asyncio.create_task(e.wait_failed()): f"engine {id} failed" for id, e in self.engines.items()}
        waits[asyncio.create_task(self.custody.wait_failed())] = "state failed: its storage takes no more records"
        try:
            done, _ = await asyncio.wait({*watched, *waits}, return_when=asyncio.FIRST_COMPLETED)
            first = next(iter(done))
            return {**watched, **waits}[first]
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def down(self) -> int:
        """Take down whatever is up: refuse, drain, stop. Returns how many children had to be killed."""
        self.serving = False
        if self.server is not None and self.serve_task is not None:
            self.server.should_exit = True
            await asyncio.gather(self.serve_task, return_exceptions=True)
        if self.renew_task is not None:
            self.renew_task.cancel()
            await asyncio.gather(self.renew_task, return_exceptions=True)
        if self.custody is not None:
            await self.custody.close()
        if self.prover is not None:
            await self.prover.close()
        for engine in self.engines.values():
            with contextlib.suppress(Exception, TimeoutError):  # its children are ended below in any case
                await asyncio.wait_for(engine.stop(), 60)
        if self.engines:
            engines.sweep(self.settings.models)
        if self.producer is not None:
            await give_gpus_back(self.producer)
            self.producer.close()
        if self._socket is not None:
            self._socket.close()
            if self.settings.listen.kind == "unix":
                self.settings.listen.path.unlink(missing_ok=True)
        killed = await processes.end(children(), patience=CHILD_PATIENCE)
        if self._lock is not None:
            self._lock.close()
        return killed


async def serve(config: Path, console: Console, load_engine: LoadEngine) -> int:
    """Boot, serve until a signal or a failure, take down. Returns the exit status."""
    boot = Boot(config, console, load_engine)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set() and boot.server is not None:
            boot.server.force_exit = True  # asked twice: do not wait for answers
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    stopping = asyncio.create_task(stop.wait())
    status, begun, reason = 0, time.monotonic(), "signal"
    try:
        up = asyncio.create_task(boot.up())
        await asyncio.wait({up, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            console.say("enclave: asked to stop during the boot")
            return 0
        await up
        if boot.policy.development:
            console.say(
                "enclave: DEVELOPMENT policy: its roots are not Intel's and NVIDIA's, nothing rests on hardware"
            )
        console.say(f"enclave: listening on {boot.address}, {_WAITS[boot.custody_state]}")
        failing = asyncio.create_task(boot.failure())
        await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        begun = time.monotonic()
        if stop.is_set():
            console.say(f"enclave: stopping; running answers get {STOP_DRAIN} s")
        else:
            reason = await failing
            console.say(f"enclave: {reason}: stopping")
            status = 3
        failing.cancel()
        await asyncio.gather(failing, return_exceptions=True)
    except BootFailed as failed:
        status, reason = _report(failed, console), "boot"
    finally:
        stopping.cancel()
        killed = await boot.down()
        telemetry.event("stop", reason=reason.split(" ")[0], ms=round((time.monotonic() - begun) * 1000))
        console.say(f"enclave: stopped{f', {killed} children had to be killed' if killed else ''}")
        telemetry.unseal()
    return status


def run(config: Path, *, load_engine: LoadEngine = engines.load) -> int:
    """`vouchsafe-enclave serve`: everything, on an event loop of its own."""
    console = Console()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(config, console, load_engine))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _report(failed: BootFailed, console: Console) -> int:
    error = failed.error
    telemetry.event(
        "boot.failed", number=failed.number, stage=STAGES[failed.number - 1].replace(" ", "-"), code=error.code
    )
    console.say(f"boot {failed.number}/{len(STAGES)} {STAGES[failed.number - 1]}: FAILED: {error}")
    if error.hint:
        console.say(f"  hint: {error.hint}")
    return 2 if isinstance(error, InputError | PolicyError) else 1
