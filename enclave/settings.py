"""The measured configuration: one TOML file, read once, whose SHA-256 is the `config` claim.

Runs in the enclave at the first boot stage, and on the operator's laptop (`vouchsafe-enclave check`). It trusts
nobody: an unknown key, a wrong type, a number outside its bounds and a path that is not there are refused with one
line that names the field. The digest covers the very bytes that were parsed (one read, no second look at the file),
so what a deployment statement allows is what runs.

Every field is required but for a model's `golden` answers outside the profile `h100-cc`.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar

from attestation.errors import InputError
from enclave.access.prices import PriceTable
from enclave.state.location import parse_postgres

__all__ = [
    "AccessSettings",
    "AppraisalSettings",
    "GpuSettings",
    "Listen",
    "ModelSettings",
    "PathSettings",
    "Settings",
    "StateSettings",
]

T = TypeVar("T")

MAX_CONFIG: Final = 256 * 1024
MAX_LIFETIME: Final = 3600
MIN_LIFETIME: Final = 60
MAX_MODELS: Final = 16
MAX_MEMORY_PERCENT: Final = 95
"""Of the device, for all models together: what is left holds the contexts and the driver."""
MAX_NAMES: Final = 16

_HEX32: Final = re.compile(r"[0-9a-f]{64}")
_WEIGHTS: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where TLS arrives. `unix`: path of the socket; `tcp`: host and port (0 picks one); `vsock`: port, any CID."""

    kind: Literal["unix", "tcp", "vsock"]
    path: Path = Path()
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}" if self.kind == "tcp" else f"vsock:{self.port}"


@dataclass(frozen=True, slots=True)
class PathSettings:
    """Directories. `tsm`, `measurements`, `acpi`, `pci` (the list of PCI functions, `/sys/bus/pci/devices`) are the
    kernel's; the host fills `statements` and `endorsements`.

    Nothing read from the last two is believed before it has been verified."""

    tsm: Path
    measurements: Path
    acpi: Path
    pci: Path
    statements: Path
    endorsements: Path
    runtime: Path


@dataclass(frozen=True, slots=True)
class AppraisalSettings:
    """The policy under which the enclave verifies its own evidence, and the SHA-256 that the file must have."""

    policy: Path
    sha256: bytes


@dataclass(frozen=True, slots=True)
class GpuSettings:
    """How many GPUs and NVSwitches must be there. No GPU: the evidence carries null, and a client's policy decides."""

    count: int
    switches: int


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """SHA-256 of the secret (its ASCII text, at least 128 random bits) for whose holder the first admin key is made,
    once. Not the secret: the configuration is public."""

    bootstrap_sha256: bytes


@dataclass(frozen=True, slots=True)
class StateSettings:
    """Where the host keeps the sealed state: `sqlite:PATH`, or a `postgresql://` URL (`enclave.state.location`)."""

    url: str


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model. `weights` is `sha256:<hex>`, the fileListDigest of the directory `path` (`enclave.weights`).

    profile        which engine runs it: `h100-cc` (production), `cpu` (real vLLM without a GPU)
    placement      `in-process`: mounted in the enclave's own process, its failure ends the enclave; at most one.
                   `process`: in a process of its own, restarted when it dies
    task           `generate`: chat and completions; `embed`: embeddings
    golden         stored answers of the self-test, at boot and after a restart; required under `h100-cc`
    memory_percent   of the GPU's memory (`cpu`: of the machine's) that the engine takes; all models' sum is bounded
    max_model_len  tokens, prompt and answer together
    """

    id: str
    path: Path
    weights: str
    profile: Literal["cpu", "h100-cc"]
    placement: Literal["in-process", "process"]
    task: Literal["generate", "embed"]
    golden: Path | None
    memory_percent: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration. Holding one proves that every path existed and every field was understood at the time
    of reading; it proves nothing about who wrote the file: that is what the operator's deployment statement is for."""

    role: Literal["both", "model", "gateway"]
    dns_names: tuple[str, ...]
    listen: Listen
    paths: PathSettings
    appraisal: AppraisalSettings
    gpu: GpuSettings
    lifetime: int
    access: AccessSettings
    state: StateSettings
    prices: PriceTable
    models: tuple[ModelSettings, ...]
    digest: bytes = field(default=b"")

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read *path* once. Raises `InputError` with one line for a person."""
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_CONFIG + 1)
        except OSError as err:
            raise InputError(
                "INPUT_CONFIG_READ",
                f"cannot read the configuration {path}: {err.strerror or err}",
                hint="name it with --config",
            ) from err
        return cls.parse(raw, base=path.resolve().parent)

    @classmethod
    def parse(cls, raw: bytes, *, base: Path) -> Settings:
        """Parse *raw*; relative paths are taken from *base*. Raises `InputError`."""
        if len(raw) > MAX_CONFIG:
            raise InputError("INPUT_CONFIG_SIZE", "the configuration is too long", expected=f"<= {MAX_CONFIG} bytes")
        try:
            document = tomllib.loads(raw.decode("utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
            raise InputError(
                "INPUT_CONFIG_TOML", f"the configuration is not TOML: {err}", hint="a key that stands twice is an error"
            ) from err
        top = _Table(document, "", base)
        settings = _settings(top, hashlib.sha256(raw).digest())
        top.done()
        return settings


class _Table:
    """A TOML table whose every key must be taken: what is left over at the end was not understood."""

    def __init__(self, values: dict[str, Any], name: str, base: Path) -> None:  # Any: TOML values
        self.values, self.name, self.base = dict(values), name, base

    def refuse(self, key: str, reason: str, *, expected: object = "", actual: object = "", hint: str = "") -> NoReturn:
        where = f"{self.name}.{key}" if self.name else key
        raise InputError("INPUT_CONFIG_FIELD", f"{where}: {reason}", expected=expected, actual=actual, hint=hint)

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self.values:
            self.refuse(key, "is missing", hint="every field is required")
        value = self.values.pop(key)
        if type(value) is not kind:  # exactly: a TOML boolean is no integer
            self.refuse(key, "has the wrong type", expected=kind.__name__, actual=type(value).__name__)
        return value

    def text(self, key: str, pattern: re.Pattern[str], what: str) -> str:
        value = self.take(key, str)
        if pattern.fullmatch(value) is None:
            self.refuse(key, "is not well formed", expected=what, actual=value)
        return value

    def sha256(self, key: str) -> bytes:
        return bytes.fromhex(self.text(key, _HEX32, "64 lower-case hex digits"))

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.take(key, int)
        if not low <= value <= high:
            self.refuse(key, "is out of bounds", expected=f"{low} to {high}", actual=value)
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:  # Any: the caller's Literal
        value = self.take(key, str)
        if value not in allowed:
            self.refuse(key, "is not known", expected=" or ".join(allowed), actual=value)
        return value

    def path(self, key: str, kind: Literal["directory", "file", "any"]) -> Path:
        text = self.take(key, str)
        if not text or "\0" in text:
            self.refuse(key, "is not a path")
        path = self.base / text
        if kind == "directory" and not path.is_dir():
            self.refuse(key, f"there is no directory {path}", hint="create it, or correct the path")
        if kind == "file" and not path.is_file():
            self.refuse(key, f"there is no file {path}", hint="create it, or correct the path")
        return path

    def table(self, key: str) -> _Table:
        return _Table(self.take(key, dict), f"{self.name}.{key}" if self.name else key, self.base)

    def done(self) -> None:
        for key in self.values:
            self.refuse(key, "is not a key that this release knows", hint="remove it, or correct its spelling")


def _settings(top: _Table, digest: bytes) -> Settings:
    version = top.take("version", int)
    if version != 1:
        top.refuse("version", "is not known", expected=1, actual=version)
    paths, appraisal, gpu = top.table("paths"), top.table("appraisal"), top.table("gpu")
    certificate = top.table("certificate")
    settings = Settings(
        role=top.choice("role", ("both", "model", "gateway")),
        dns_names=_dns_names(top),
        listen=_listen(top),
        paths=PathSettings(
            tsm=paths.path("tsm", "directory"),
            measurements=paths.path("measurements", "directory"),
            acpi=paths.path("acpi", "directory"),
            pci=paths.path("pci", "directory"),
            statements=paths.path("statements", "directory"),
            endorsements=paths.path("endorsements", "directory"),
            runtime=paths.path("runtime", "any"),
        ),
        appraisal=AppraisalSettings(appraisal.path("policy", "file"), appraisal.sha256("sha256")),
        gpu=GpuSettings(gpu.integer("count", 0, 16), gpu.integer("switches", 0, 8)),
        lifetime=certificate.integer("lifetime-seconds", MIN_LIFETIME, MAX_LIFETIME),
        access=_access(top),
        state=_state(top),
        prices=PriceTable.parse(top.take("prices", dict)),
        models=_models(top),
        digest=digest,
    )
    for table in (paths, appraisal, gpu, certificate):
        table.done()
    priced, served = set(settings.prices.models), {m.id for m in settings.models}
    if priced != served:  # without a price nothing is served, and a price without a model is a slip of the pen
        top.refuse("prices.models", "are not the models served", expected=sorted(served), actual=sorted(priced))
    if settings.gpu.switches and not settings.gpu.count:
        gpu.refuse("switches", "switches without a GPU make no sense", expected=0, actual=settings.gpu.switches)
    return settings


def _dns_names(top: _Table) -> tuple[str, ...]:
    names = top.take("dns-names", list)
    if not 1 <= len(names) <= MAX_NAMES:
        top.refuse("dns-names", "wrong number of names", expected=f"1 to {MAX_NAMES}", actual=len(names))
    for name in names:
        if not isinstance(name, str) or len(name) > 253 or _DNS_NAME.fullmatch(name) is None:
            top.refuse("dns-names", "not a DNS name", expected="lower-case A-labels, no wildcard", actual=name)
    if len(set(names)) != len(names):
        top.refuse("dns-names", "a name stands twice")
    return tuple(sorted(names))


def _listen(top: _Table) -> Listen:
    text = top.take("listen", str)
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        path = top.base / rest
        if len(str(path).encode()) > 107:  # sun_path of unix(7), with its final NUL
            top.refuse("listen", "the socket's path is too long", expected="<= 107 bytes", actual=len(str(path)))
        return Listen("unix", path=path)
    host, _, digits = rest.rpartition(":")
    port = int(digits) if re.fullmatch(r"[0-9]{1,10}", digits) else -1
    if kind == "tcp" and host and 0 <= port <= 65535:
        return Listen("tcp", host=host.removeprefix("[").removesuffix("]"), port=port)
    if kind == "vsock" and not host and 0 < port < 2**32 - 1:
        return Listen("vsock", port=port)
    return top.refuse("listen", "is not an address", expected="unix:PATH, tcp:HOST:PORT or vsock:PORT", actual=text)


def _access(top: _Table) -> AccessSettings:
    table = top.table("access")
    access = AccessSettings(table.sha256("bootstrap-sha256"))
    table.done()
    return access


def _state(top: _Table) -> StateSettings:
    table = top.table("state")
    url = table.take("url", str)
    table.done()
    if url.startswith("sqlite:"):
        path = top.base / url.removeprefix("sqlite:")
        if not path.parent.is_dir():
            top.refuse("state.url", f"there is no directory {path.parent}", hint="create it, or correct the path")
        return StateSettings(f"sqlite:{path}")
    parse_postgres(url)  # what cannot be read is told now, not after the engines have started
    return StateSettings(url)


def _models(top: _Table) -> tuple[ModelSettings, ...]:
    rows = top.take("models", list)
    if not 1 <= len(rows) <= MAX_MODELS:
        top.refuse("models", "wrong number of models", expected=f"1 to {MAX_MODELS}", actual=len(rows))
    models = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            top.refuse("models", "every model is a table", expected="[[models]]", actual=type(row).__name__)
        models.append(_model(_Table(row, f"models[{index}]", top.base)))
    if len({m.id for m in models}) != len(models):
        top.refuse("models", "a model id stands twice")
    mounted = [m.id for m in models if m.placement == "in-process"]
    if len(mounted) > 1:  # a second vLLM in one process would take the first one's metrics and environment
        top.refuse("models", "more than one is in-process", expected="at most one", actual=", ".join(mounted))
    if (total := sum(m.memory_percent for m in models)) > MAX_MEMORY_PERCENT:
        top.refuse(
            "models", "together they ask for too much memory", expected=f"<= {MAX_MEMORY_PERCENT}", actual=total,
            hint="lower memory-percent",
        )  # fmt: skip
    return tuple(models)


def _model(table: _Table) -> ModelSettings:
    model = ModelSettings(
        id=table.text("id", _MODEL_ID, "letters, digits, . _ / : -, at most 128"),
        path=table.path("path", "directory"),
        weights=table.text("weights", _WEIGHTS, "sha256: and 64 lower-case hex digits"),
        profile=table.choice("profile", ("cpu", "h100-cc")),
        placement=table.choice("placement", ("in-process", "process")),
        task=table.choice("task", ("generate", "embed")),
        golden=table.path("golden", "file") if "golden" in table.values else None,
        memory_percent=table.integer("memory-percent", 1, MAX_MEMORY_PERCENT),
        max_model_len=table.integer("max-model-len", 16, 10_000_000),
    )
    if model.profile == "h100-cc" and model.golden is None:
        # Known faults of engines in CC mode give wrong text with status 200; only stored answers show them.
        table.refuse("golden", "is missing", hint="profile h100-cc needs stored answers for its self-test")
    table.done()
    return model
