"""The Appraisal Policy for Evidence (RFC 9334 §8.5): what a relying party asks for, read from TOML.

Every field is required. There is no default that means "not checked": to leave a check out one writes
`field = { any = "the reason" }`, and the reason is printed with every result. What is permissive by mistake is
refused when the policy is read: an unknown or duplicate key, an empty list, a wildcard, a threshold of zero, a
development root in a policy that is not marked `development = true`.

Pure: text in, frozen values out. Roots of development policies stand in the text itself (PEM), so that a policy is
one file and its digest covers all of it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from cryptography import x509

from attestation import roots as built_in
from attestation.dsse import small_order
from attestation.errors import PolicyError
from attestation.policy_table import Skip, Table

__all__ = [
    "ChannelPolicy",
    "DeploymentPolicy",
    "GpuPolicy",
    "Policy",
    "ReleasePolicy",
    "Roots",
    "Skip",
    "TdxPolicy",
    "platform_policy",
]

MAX_POLICY: Final = 256 * 1024
MAX_URL: Final = 2000
_LABEL: Final = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_URL: Final = re.compile(rf"https://{_LABEL}(\.{_LABEL})*(:(?P<port>[1-9][0-9]{{0,4}}))?/[A-Za-z0-9._~/?&=%+,;:@-]*")
GPU_STAGES: Final = (
    "parse",
    "nonce",
    "signature",
    "chain",
    "fwid",
    "distinct",
    "mode",
    "count",
    "rim",
    "ocsp_device",
    "ocsp_rim",
    "topology",
)
TCB_STATUSES: Final = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "TDRelaunchAdvised",
        "TDRelaunchAdvisedConfigurationNeeded",
    }
)
"""What a policy may allow. `OutOfDateConfigurationNeeded` and `Revoked` are refused under every policy."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Trust anchors, DER. `built_in` is false when any of them was named by the policy or a command line."""

    intel: bytes
    nvidia_device: bytes
    nvidia_rim: bytes

    @property
    def built_in(self) -> bool:
        return self == BUILT_IN_ROOTS


BUILT_IN_ROOTS: Final = Roots(built_in.INTEL_SGX_ROOT_CA, built_in.NVIDIA_DEVICE_ROOT, built_in.NVIDIA_RIM_ROOT)


@dataclass(frozen=True, slots=True)
class TdxPolicy:
    """What a TDX quote must show. MRSIGNERSEAM, SEAMATTRIBUTES, MRSERVICETD are always required to be zero.

    tcb_status          allowed platform and QE statuses (Intel's words)
    advisories          advisory ids that may be present (an allow list; empty means none)
    min_tcb_evaluation  floor of tcbEvaluationDataNumber over TCB info and QE identity
    max_collateral_age  seconds since issueDate of TCB info and QE identity
    td_attributes, xfam allowed values, compared whole
    mrseam              allowed TDX module measurements, 48 bytes each
    mrconfigid, mrowner, mrownerconfig   exact 48 bytes
    platforms           allowed platform instance ids or PPIDs (16 bytes each)
    """

    tcb_status: frozenset[str] | Skip
    advisories: frozenset[str] | Skip
    min_tcb_evaluation: int | Skip
    max_collateral_age: int | Skip
    td_attributes: frozenset[int] | Skip
    xfam: frozenset[int] | Skip
    mrseam: frozenset[bytes] | Skip
    mrconfigid: bytes | Skip
    mrowner: bytes | Skip
    mrownerconfig: bytes | Skip
    platforms: frozenset[bytes] | Skip


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """What GPU and switch evidence must show.

    count, switches  exact numbers of GPUs and NVSwitches
    mode             spt (single GPU), ppcie (protected PCIe), mpt (NVLink encryption)
    drivers, vbios, hwmodels   allow lists, compared whole
    require          stages that decide the verdict, out of `GPU_STAGES`; the others are reported as skipped
    """

    count: int | Skip
    switches: int | Skip
    mode: Literal["spt", "ppcie", "mpt"] | Skip
    drivers: frozenset[str] | Skip
    vbios: frozenset[str] | Skip
    hwmodels: frozenset[str] | Skip
    require: frozenset[str]


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """Whose release manifests count as reference values: Ed25519 keys (32 bytes) and how many must have signed."""

    signers: frozenset[bytes]
    threshold: int


@dataclass(frozen=True, slots=True)
class DeploymentPolicy:
    """Whose deployment statement is believed: operator keys, how many must have signed, the lowest serial, the role.

    status_list   whether a current status list is required, or the reason why not
    status_url    where the operator publishes it: a second road, past a host that holds a newer list back
    """

    operators: frozenset[bytes]
    threshold: int
    min_serial: int
    role: Literal["both", "model", "gateway"]
    status_list: Literal["required"] | Skip
    status_url: str | Skip


@dataclass(frozen=True, slots=True)
class ChannelPolicy:
    """Which channel proof a connection must give before a user's first byte: bound to the exporter, or to the key."""

    proof: Literal["exporter", "key"] | Skip
    fresh_gpu: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy. Holding one proves that it was written without a permissive mistake this reader knows of.

    exception   DSSE envelope of a TCB exception that came beside the policy, undecided (`attestation.exceptions`)
    """

    name: str
    development: bool
    digest: bytes
    roots: Roots
    tdx: TdxPolicy
    gpu: GpuPolicy | Skip
    release: ReleasePolicy | Skip
    deployment: DeploymentPolicy | Skip
    channel: ChannelPolicy
    exception: bytes | None = field(default=None, repr=False)

    @property
    def label(self) -> tuple[str, str]:
        """Name and digest (hex), as a result carries them; with an exception another digest than without."""
        if self.exception is None:
            return self.name, self.digest.hex()
        return self.name, hashlib.sha256(self.digest + self.exception).hexdigest()

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read TOML *text*. Raises `PolicyError` naming the field, what was expected and what stands there."""
        if len(text) > MAX_POLICY:
            raise PolicyError("POLICY_SIZE", "the policy is too long", expected=f"<= {MAX_POLICY}", actual=len(text))
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as err:
            raise PolicyError(
                "POLICY_TOML", f"not valid TOML: {err}", hint="a key that stands twice is an error too"
            ) from err
        return _policy(Table(document, ""), hashlib.sha256(text.encode()).digest())


_NO_COUNT: Final = Skip("no count given")
_NO_MODE: Final = Skip("no mode given")


def platform_policy(
    *,
    roots: Roots = BUILT_IN_ROOTS,
    min_tcb_evaluation: int | Skip = 20,
    gpu_require: frozenset[str] = frozenset(GPU_STAGES),
    gpu_count: int | Skip = _NO_COUNT,
    gpu_switches: int | Skip = _NO_COUNT,
    gpu_mode: Literal["spt", "ppcie", "mpt"] | Skip = _NO_MODE,
) -> Policy:
    """The built-in policy `platform`: everything about the platform, nothing about what runs on it.

    A client refuses to connect under it. The default of the offline commands."""
    why = "policy `platform` appraises the platform only: compare with a release manifest"
    absent = Skip("policy `platform` appraises the platform only")
    stated = f"platform floor={min_tcb_evaluation} require={sorted(gpu_require)} {gpu_count} {gpu_switches} {gpu_mode}"
    return Policy(
        name="platform",
        development=not roots.built_in,
        digest=_mixed(hashlib.sha256(stated.encode()).digest(), roots),
        roots=roots,
        tdx=TdxPolicy(
            tcb_status=frozenset({"UpToDate"}),
            advisories=frozenset(),
            min_tcb_evaluation=min_tcb_evaluation,
            max_collateral_age=30 * 86400,
            td_attributes=frozenset({0x10000000}),
            xfam=frozenset({0x207, 0x600E7, 0x602E7, 0x618E7, 0x61AE7, 0x642E7}),
            mrseam=Skip(why),
            mrconfigid=Skip(why),
            mrowner=Skip(why),
            mrownerconfig=Skip(why),
            platforms=absent,
        ),
        gpu=GpuPolicy(
            count=gpu_count,
            switches=gpu_switches,
            mode=gpu_mode,
            drivers=absent,
            vbios=absent,
            hwmodels=absent,
            require=gpu_require,
        ),
        release=absent,
        deployment=absent,
        channel=ChannelPolicy(proof=absent, fresh_gpu=False),
    )


def with_roots(policy: Policy, roots: Roots) -> Policy:
    """*policy* under other roots: an offline command's `--root`. The verdict is then marked development, and the digest
    is no more that of the text: whoever keeps verdicts by digest must not mix the two."""
    if roots == policy.roots:
        return policy
    development = policy.development or not roots.built_in
    return replace(policy, roots=roots, development=development, digest=_mixed(policy.digest, roots))


def _mixed(digest: bytes, roots: Roots) -> bytes:
    """*digest* of what a policy says, mixed with the roots that did not stand in its text."""
    parts = (digest, roots.intel, roots.nvidia_device, roots.nvidia_rim)
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).digest()


def _policy(top: Table, digest: bytes) -> Policy:
    if top.number("version") != 1:
        top.bad("version", "1", "another version")
    name = top.text("name")
    development = bool(top.take("development", bool, "true or false"))
    roots = _roots(top.table("roots"), development)
    tdx = _tdx(top.table("tdx"))
    gpu = top.section("gpu", lambda t: _gpu(t, development))
    release = top.section("release", _release)
    deployment = top.section("deployment", _deployment)
    channel = _channel(top.table("channel"))
    top.done()
    if channel.fresh_gpu and (isinstance(gpu, Skip) or isinstance(channel.proof, Skip)):
        # Nobody would ever be asked: a wish that reads like a check.
        top.bad("channel", "fresh-gpu = false without a GPU or without a channel proof", "fresh-gpu = true")
    if not development:
        for key, value in (("release", release), ("deployment", deployment)):
            if isinstance(value, Skip):
                top.bad(key, "a table: a production policy pins releases and the operator", value.why)
    return Policy(name, development, digest, roots, tdx, gpu, release, deployment, channel)


def _roots(t: Table, development: bool) -> Roots:
    def root(key: str, ours: bytes) -> bytes:
        value = t.text(key)
        if value == "built-in":
            return ours
        if not development:
            t.bad(key, '"built-in"', "a certificate, in a policy that is not marked development", "POLICY_ROOT")
        match = re.fullmatch(r"\s*-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*", value)
        if match is None:
            t.bad(key, '"built-in" or one PEM certificate', "something else")
        try:
            der = base64.b64decode("".join(match[1].split()), validate=True)
            x509.load_der_x509_certificate(der)
        except Exception:  # not all of the library's refusals are ValueErrors (InvalidVersion is none)
            t.bad(key, '"built-in" or one PEM certificate', "PEM that holds no certificate")
        return der

    found = Roots(
        root("intel", BUILT_IN_ROOTS.intel),
        root("nvidia-device", BUILT_IN_ROOTS.nvidia_device),
        root("nvidia-rim", BUILT_IN_ROOTS.nvidia_rim),
    )
    t.done()
    return found


def _tdx(t: Table) -> TdxPolicy:
    def statuses(key: str) -> frozenset[str]:
        values = frozenset(t.texts(key))
        if not values <= TCB_STATUSES:
            t.bad(key, ", ".join(sorted(TCB_STATUSES)), ", ".join(sorted(values - TCB_STATUSES)))
        return values

    def advisories(key: str) -> frozenset[str]:
        values = frozenset(t.texts(key, empty=True))
        if not all(re.fullmatch(r"INTEL-(SA|DOC)-[0-9]{5}", v) for v in values):
            t.bad(key, "advisory ids such as INTEL-SA-00837", sorted(values))
        return values

    found = TdxPolicy(
        tcb_status=t.rule("tcb-status", statuses),
        advisories=t.rule("advisories", advisories),
        min_tcb_evaluation=t.rule("min-tcb-evaluation", lambda k: t.number(k, 1)),
        max_collateral_age=t.rule("max-collateral-age-days", lambda k: 86400 * t.number(k, 1)),
        td_attributes=t.rule("td-attributes", t.masks),
        xfam=t.rule("xfam", t.masks),
        mrseam=t.rule("mrseam", lambda k: t.hexes(k, 48)),
        mrconfigid=t.rule("mrconfigid", lambda k: t.hex(k, 48)),
        mrowner=t.rule("mrowner", lambda k: t.hex(k, 48)),
        mrownerconfig=t.rule("mrownerconfig", lambda k: t.hex(k, 48)),
        platforms=t.rule("platforms", lambda k: t.hexes(k, 16)),
    )
    t.done()
    return found


def _gpu(t: Table, development: bool) -> GpuPolicy:
    def stages(key: str) -> frozenset[str]:
        values = t.texts(key)
        if values == ["all"]:
            return frozenset(GPU_STAGES)
        if not set(values) <= set(GPU_STAGES):
            t.bad(key, f'["all"] or stages out of {", ".join(GPU_STAGES)}', values)
        if not development and set(values) != set(GPU_STAGES):
            # A stage that is not listed is not asked: without its signature or nonce, evidence is a rumour.
            t.bad(key, '["all"]: only a development policy leaves stages out', values)
        return frozenset(values)

    found = GpuPolicy(
        count=t.rule("count", lambda k: t.number(k, 1)),
        switches=t.rule("switches", t.number),
        mode=t.rule("mode", lambda k: t.word(k, ("spt", "ppcie", "mpt"))),
        drivers=t.rule("drivers", lambda k: frozenset(t.texts(k))),
        vbios=t.rule("vbios", lambda k: frozenset(t.texts(k))),
        hwmodels=t.rule("hwmodels", lambda k: frozenset(t.texts(k))),
        require=stages("require"),
    )
    t.done()
    return found


def _keys(t: Table, key: str) -> tuple[frozenset[bytes], int]:
    keys = t.hexes(key, 32)
    if weak := sorted(k.hex() for k in keys if small_order(k)):
        t.bad(key, "Ed25519 public keys", f"{weak[0]}, under which anybody can sign", "POLICY_WEAK_KEY")
    threshold = t.number("threshold", 1)
    if threshold > len(keys):
        t.bad("threshold", f"at most {len(keys)}, the number of keys", threshold)
    return keys, threshold


def _release(t: Table) -> ReleasePolicy:
    found = ReleasePolicy(*_keys(t, "signers"))
    t.done()
    return found


def _deployment(t: Table) -> DeploymentPolicy:
    keys, threshold = _keys(t, "operators")
    found = DeploymentPolicy(
        keys,
        threshold,
        min_serial=t.number("min-serial"),
        role=t.word("role", ("both", "model", "gateway")),
        status_list=t.rule("status-list", lambda k: t.word(k, ("required",))),
        status_url=t.rule("status-url", lambda k: _url(t, k)),
    )
    if isinstance(found.status_list, Skip) and not isinstance(found.status_url, Skip):
        # It would be fetched for nothing: a wish that reads like a check.
        t.bad("status-url", '{ any = "why" }, since status-list is left out', found.status_url)
    t.done()
    return found


def _url(t: Table, key: str) -> str:
    """Plain: host in lower-case letters (an A-label where needed), no user, no fragment, nothing to decode."""
    value = t.text(key)
    found = _URL.fullmatch(value)
    if len(value) > MAX_URL or found is None or int(found["port"] or 443) > 65535:
        t.bad(key, '"https://host[:port]/path"', f"{value!r}")
    return value


def _channel(t: Table) -> ChannelPolicy:
    found = ChannelPolicy(
        proof=t.rule("proof", lambda k: t.word(k, ("exporter", "key"))),
        fresh_gpu=bool(t.take("fresh-gpu", bool, "true or false")),
    )
    t.done()
    return found
