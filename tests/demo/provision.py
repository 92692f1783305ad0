"""Everything that an operator and a builder prepare before an enclave starts, for one development machine.

Made by the same functions that production uses; only the keys are made on the spot and the roots are those of the
development TEE. What it writes into a directory:

    builder.pem operator.pem   Ed25519 keys (0600): who signs releases, who signs statements
    statements/                release.json deployment.json status.json, as the host lays them into the guest
    appraisal.toml             the policy under which the enclave verifies itself
    enclave.toml               the measured configuration
    state/                     where the enclave keeps its sealed state
    policy.toml                a client's policy: pins builder and operator, asks for the exporter-bound proof
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.deployment import DEPLOYMENT_PAYLOAD_TYPE, STATUS_PAYLOAD_TYPE, new_statement, new_status_list
from attestation.dsse import Envelope, public_bytes, sign
from attestation.policy import Policy
from attestation.reference_values import RELEASE_PAYLOAD_TYPE, new_manifest
from enclave.settings import Settings
from enclave.weights import file_list_digest
from tests.devtee.gpu import GpuForm
from tests.devtee.tee import DevTee

__all__ = ["Provisioned", "provision"]

DAY = 86400


@dataclass(frozen=True, slots=True)
class Provisioned:
    """Paths of what was made, and the bootstrap secret (its SHA-256 is in the configuration)."""

    directory: Path
    config: Path
    policy: Path
    appraisal: Path
    statements: Path
    secret: str = field(repr=False)
    release: bytes
    operator: Ed25519PrivateKey = field(repr=False)
    builder: Ed25519PrivateKey = field(repr=False)
    salt: bytes = field(repr=False)
    platform: bytes = field(repr=False)
    dns_name: str = ""

    def write_status(self, *, serial: int | None = None, lifetime: int = 3600, **denied: list[bytes]) -> None:
        """A new status list, valid from now for at most an hour: an operator publishes one before the last runs out."""
        now = int(time.time())
        payload = new_status_list(
            serial=now if serial is None else serial, issued_at=now, next_update=now + lifetime,
            **denied,
        )  # fmt: skip
        _replace(self.statements / "status.json", sign(STATUS_PAYLOAD_TYPE, payload, [self.operator]))

    def write_deployment(self, *, configs: list[bytes] | None = None, serial: int = 1) -> None:
        """A new statement for this machine and, unless told otherwise, for the configuration as it stands."""
        now = int(time.time())
        payload = new_statement(
            operator="vouchsafe demo operator", serial=serial, not_before=now - 60, not_after=now - 60 + 7 * DAY,
            dns_names=[self.dns_name], roles=["both"],
            configs=configs or [hashlib.sha256(self.config.read_bytes()).digest()], releases=[self.release],
            salt=self.salt, platforms=[("piid", self.platform)],
        )  # fmt: skip
        _replace(self.statements / "deployment.json", sign(DEPLOYMENT_PAYLOAD_TYPE, payload, [self.operator]))


def provision(
    directory: Path,
    devtee: Path,
    model_dir: Path,
    golden: Path | None,
    model_id: str,
    listen: str,
    dns_name: str,
    *,
    gpus: int = 1,
    lifetime: int = 3600,
    max_model_len: int = 2048,
    more: Sequence[str] = (),
    embedders: Sequence[str] = (),
) -> Provisioned:
    """Make all of it in *directory*. *devtee* is the state directory of a development TEE that has started.

    listen   `unix:PATH` or `tcp:HOST:PORT`, as the enclave's configuration takes it;  gpus   0 for a machine without
    more     ids under which the same model is served again, each by a process of its own
    embedders   the same, as models that embed
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    statements = directory / "statements"
    statements.mkdir(exist_ok=True)
    (directory / "state").mkdir(mode=0o700, exist_ok=True)
    tee = DevTee.load(devtee)
    builder, operator = _key(directory / "builder.pem"), _key(directory / "operator.pem")
    weights = file_list_digest(model_dir)
    release_raw = _release(devtee, tee, builder, (model_id, *more, *embedders), weights)
    (statements / "release.json").write_bytes(release_raw)

    appraisal, policy, config = (directory / name for name in ("appraisal.toml", "policy.toml", "enclave.toml"))
    for path, name in ((appraisal, "enclave-self"), (policy, "demo-client")):
        text = _policy(tee, name, operator, builder, gpus)
        Policy.parse(text)  # what a reader would refuse must not be written
        path.write_text(text, encoding="utf-8")
    secret = secrets.token_urlsafe(32)
    config.write_text(
        _config(
            directory, devtee, appraisal, listen, dns_name, secret, model_dir.resolve(), golden, model_id, weights,
            gpus, lifetime, max_model_len, more, embedders,
        ),
        encoding="utf-8",
    )  # fmt: skip
    made = Provisioned(
        directory=directory, config=config, policy=policy, appraisal=appraisal, statements=statements, secret=secret,
        release=Envelope.parse(release_raw).digest, operator=operator, builder=builder, salt=secrets.token_bytes(32),
        platform=tee.pki.facts.piid, dns_name=dns_name,
    )  # fmt: skip
    made.write_deployment()
    made.write_status()
    Settings.load(config)
    return made


def _release(devtee: Path, tee: DevTee, builder: Ed25519PrivateKey, ids: Sequence[str], weights: str) -> bytes:
    """The release manifest's envelope. Registers are read where the enclave's attester reads them."""

    def register(name: str) -> bytes:
        return (devtee / "measurements" / f"{name}:sha384").read_bytes()

    form = GpuForm()
    payload = new_manifest(
        name="vouchsafe-devtee", version="0.1.0-development", source_commit="0" * 40,
        subjects=[("vouchsafe-devtee.img", hashlib.sha256(register("mrtd")).digest())],
        mrtd=register("mrtd"), rtmrs=[[register(f"rtmr{i}")] for i in range(3)],
        td_attributes=[tee.td.td_attributes], xfam=[tee.td.xfam], mrseam=[tee.td.mrseam],
        drivers=[form.driver], vbios=[form.vbios], weights=[(id, weights, None) for id in ids],
        not_before=datetime.fromtimestamp(int(time.time()) - 60, UTC), max_age_days=30,
    )  # fmt: skip
    return sign(RELEASE_PAYLOAD_TYPE, payload, [builder])


def _policy(tee: DevTee, name: str, operator: Ed25519PrivateKey, builder: Ed25519PrivateKey, gpus: int) -> str:
    pem = {n: json.dumps(t.decode()) for n, t in tee.roots_pem.items()}
    if gpus:
        gpu = f"""[gpu]
count = {gpus}
switches = 0
mode = "spt"
drivers = ["{GpuForm().driver}"]
vbios = ["{GpuForm().vbios}"]
hwmodels = {{ any = "simulated devices have model names of their own" }}
require = ["all"]
"""
        gpu_line = ""
    else:
        gpu, gpu_line = "", 'gpu = { any = "a development machine without a GPU" }\n'
    return f"""version = 1
name = "{name}"
development = true
{gpu_line}
[roots]
intel = {pem["intel"]}
nvidia-device = {pem["nvidia_device"]}
nvidia-rim = {pem["nvidia_rim"]}

[tdx]
tcb-status = ["UpToDate"]
advisories = []
min-tcb-evaluation = 20
max-collateral-age-days = 30
td-attributes = ["{tee.td.td_attributes:#x}"]
xfam = ["{tee.td.xfam:#x}"]
mrseam = ["{tee.td.mrseam.hex()}"]
mrconfigid = "zero"
mrowner = "zero"
mrownerconfig = "zero"
platforms = {{ any = "the operator's deployment statement names the platform" }}

{gpu}
[release]
signers = ["{public_bytes(builder).hex()}"]
threshold = 1

[deployment]
operators = ["{public_bytes(operator).hex()}"]
threshold = 1
min-serial = 1
role = "both"
status-list = "required"
status-url = {{ any = "this operator publishes the list through the enclave alone" }}

[channel]
proof = "exporter"
fresh-gpu = false
"""


def _config(
    directory: Path, devtee: Path, appraisal: Path, listen: str, dns_name: str, secret: str, model_dir: Path,
    golden: Path | None, model_id: str, weights: str, gpus: int, lifetime: int, max_model_len: int, more: Sequence[str],
    embedders: Sequence[str],
) -> str:  # fmt: skip
    further = [
        f"""
[[models]]
id = {json.dumps(id)}
path = {json.dumps(str(model_dir))}
weights = "{weights}"
profile = "cpu"
placement = "process"
task = "{task}"
memory-percent = 10
max-model-len = {max_model_len}
"""
        for ids, task in ((more, "generate"), (embedders, "embed"))
        for id in ids
    ]
    golden_line = f"golden = {json.dumps(str(golden.resolve()))}\n" if golden is not None else ""
    return f"""version = 1
role = "both"
dns-names = [{json.dumps(dns_name)}]
listen = {json.dumps(listen)}

[paths]
tsm = {json.dumps(str(devtee / "tsm"))}
measurements = {json.dumps(str(devtee / "measurements"))}
acpi = {json.dumps(str(devtee / "acpi"))}
pci = {json.dumps(str(devtee / "pci"))}
statements = "statements"
endorsements = {json.dumps(str(devtee / "endorsements"))}
runtime = "run"

[appraisal]
policy = {json.dumps(appraisal.name)}
sha256 = "{hashlib.sha256(appraisal.read_bytes()).hexdigest()}"

[gpu]
count = {gpus}
switches = 0

[certificate]
lifetime-seconds = {lifetime}

[access]
bootstrap-sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"

[state]
url = "sqlite:state/state.db"

[prices]
currency = "USD"
unit = "nano-usd-per-million-tokens"
{"".join(_price(id) for id in (model_id, *more, *embedders))}
[[models]]
id = {json.dumps(model_id)}
path = {json.dumps(str(model_dir))}
weights = "{weights}"
profile = "cpu"
placement = "in-process"
task = "generate"
{golden_line}memory-percent = 10
max-model-len = {max_model_len}
{"".join(further)}"""


def _price(id: str) -> str:
    return f"""
[prices.models.{json.dumps(id)}]
input = 150_000_000
cached-input = 75_000_000
output = 600_000_000
"""


def _key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key, kept in *path* (PEM, 0600) for the commands that sign later documents."""
    key = Ed25519PrivateKey.generate()
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old or the new document, never half of one."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_bytes(content)
    fresh.replace(path)
