"""Appraisal of GPU evidence: reports, chains, reference values, revocation, and the devices taken together.

This docstring is the algorithm; the body carries the same numbers. Stages are those of `policy.GPU_STAGES`.

    (1)  gpu.parse        every report is a strict SPDM 1.1 report of the kind the evidence says
    (2)  gpu.nonce        every report was made for the one nonce the verifier computed
    (3)  gpu.signature    ECDSA P-384 over request ‖ response by the attestation key (AK)
    (4)  gpu.chain        AK, IK, ICA, Identity below the pinned device root, valid now
    (5)  gpu.fwid         firmware id of the report = firmware id in the AK certificate (GPUs)
    (6)  gpu.distinct     no device stands twice: identity serials and keys differ
    (7)  gpu.mode         every GPU says one mode, all say the same, the policy's
    (8)  gpu.count        exactly as many GPUs and switches as the policy says
    (9)  gpu.rim          signed golden values for this version; every active measurement equal to one of them
    (10) gpu.ocsp-device  IK, ICA, Identity are good now;  gpu.ocsp-rim: the RIM signers L4, L3, L2 are
    (11) gpu.topology     GPUs and switches see each other, as the mode needs
    (12) gpu.driver, gpu.vbios, gpu.hwmodel   in the policy's allow lists

Every device goes through every stage and every failure is recorded; one of them fails the whole. A stage that the
policy does not require is reported as skipped; a required stage without input (no RIM, no answer, no GPU) is a
failure. A report that does not parse fails whatever the policy requires. Pure: the time is an argument.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from attestation.errors import FormatError, RefusedError, VouchsafeError
from attestation.gpu.certificates import Certificate, check_chain
from attestation.gpu.evidence import CHAIN, MAX_GPUS, MAX_SWITCHES, GpuDevice, GpuEvidence
from attestation.gpu.fwid import certified_fwid
from attestation.gpu.ocsp import OcspAnswers
from attestation.gpu.report import Kind, Report
from attestation.gpu.rim import SIGNERS, Rim, compare, rim_ids, rim_versions
from attestation.gpu.topology import Mode, check_topology, device_mode
from attestation.policy import GpuPolicy, Skip
from attestation.result import Check, Checks, Status

__all__ = ["GpuDeviceFacts", "GpuEndorsements", "GpuFacts", "appraise"]

_SPDM: Final = "DMTF DSP0274 1.1 §10.11"
_PKIX: Final = "RFC 5280 §6"
_DICE: Final = "TCG DICE Certificate Profiles"
_XML: Final = "ISO/IEC 19770-2; W3C XML Signature 1.1"
_OCSP: Final = "RFC 6960 §3.2"
_RATLS: Final = "vouchsafe RA-TLS profile, §3.2"
_POLICY: Final = "RFC 9334 §8.5"
_PPCIE: Final = "NVIDIA protected PCIe"


@dataclass(frozen=True, slots=True)
class GpuEndorsements:
    """What NVIDIA says of its devices; the carrier is not trusted.

    rims   RIM id (`rim.rim_ids`) → SWID XML
    ocsp   any name → OCSP answer (DER)
    """

    rims: Mapping[str, bytes]
    ocsp: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class GpuDeviceFacts:
    """One accepted device. driver is empty and mode None for a switch; ik_serial, the device's identity, is hex."""

    kind: Kind
    driver: str
    vbios: str
    hwmodel: str
    ik_serial: str
    mode: Mode | None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What follows from accepted GPU evidence. Holding one proves that every required stage passed for every device; it
    does not prove that the devices sit in one machine with the TD (see the result's `not_proven`).

    mode          the one mode of all GPUs; empty when there is no GPU, or GPUs differ and the stage is not required
    valid_until   unix seconds: the earliest end of a certificate or OCSP answer that a required stage used
    """

    devices: tuple[GpuDeviceFacts, ...]
    mode: str
    valid_until: int


@dataclass(slots=True)
class _Device:
    """One device on its way through the stages. `why` says, for later stages, why report or chain is missing."""

    label: str
    raw: GpuDevice
    report: Report | None = None
    chain: tuple[Certificate, ...] | None = None
    mode: Mode | None = None

    @property
    def gpu(self) -> bool:
        return self.raw.kind == "gpu"

    def need_report(self) -> Report:
        if self.report is None:
            raise RefusedError("GPU_NO_REPORT", "there is no report to look at: it did not parse")
        return self.report

    def need_certificate(self, depth: int) -> Certificate:
        """AK (0) or IK (1), parsed; whether the chain holds is a stage of its own."""
        if len(self.raw.chain) <= depth:
            raise RefusedError("GPU_CHAIN_LENGTH", "the chain is too short", expected=CHAIN, actual=len(self.raw.chain))
        return Certificate.parse(self.raw.chain[depth])


@dataclass(slots=True)
class _Book:
    """The stages' way of writing into `checks`: per device, required or not, never raising."""

    checks: Checks
    require: frozenset[str]
    failed: bool = False
    ends: list[int] = field(default_factory=list)

    def wants(self, stage: str) -> bool:
        """Whether *stage* decides; a stage that does not is written down as skipped."""
        if stage in self.require:
            return True
        self.checks.skip(_id(stage), f"the policy does not require the stage {stage}", cite=_POLICY)
        return False

    def run(self, stage: str, label: str, reason: str, cite: str, judge: Callable[[], str]) -> None:
        """Pass when *judge* returns (what was seen), fail with the code of what it raises."""
        try:
            seen = judge()
        except (RefusedError, FormatError) as err:
            self.fail(stage, label, err, cite)
            return
        self.checks.add(Check(_id(stage), Status.PASS, "OK", f"{label}: {reason}", actual=seen, cite=cite))

    def each(
        self, stage: str, devices: Iterable[_Device], reason: str, cite: str, judge: Callable[[_Device], str]
    ) -> None:
        """`run` for every one of *devices*."""
        for device in devices:
            self.run(stage, device.label, reason, cite, partial(judge, device))

    def fail(self, stage: str, label: str, err: VouchsafeError, cite: str) -> None:
        self.failed = True
        reason = f"{label}: {err.reason}"
        self.checks.add(Check(_id(stage), Status.FAIL, err.code, reason, err.expected, err.actual, cite))


def appraise(
    evidence: GpuEvidence,
    endorsements: GpuEndorsements,
    *,
    nonce: bytes,
    policy: GpuPolicy,
    device_root: bytes,
    rim_root: bytes,
    now: int,
    checks: Checks,
) -> GpuFacts | None:
    """Steps (1) to (12) at *now* (unix seconds); None when any of them failed.

    nonce                  32 bytes, recomputed by the verifier, never taken from the evidence
    device_root, rim_root  DER: the trust anchors
    """
    book = _Book(checks, policy.require)
    devices = _labelled(evidence)
    _parse(devices, book)
    if book.wants("nonce"):
        book.each("nonce", devices, "the report was made for this nonce", _RATLS, lambda d: _nonce(d, nonce))
    if book.wants("signature"):
        book.each("signature", devices, "the attestation key signed the report", _SPDM, _sign)
    if book.wants("chain"):
        book.each(
            "chain", devices, "the chain ends in the pinned root, valid now", _PKIX,
            lambda d: _chain(d, device_root, now, book),
        )  # fmt: skip
    _fwid(devices, book)
    _distinct(devices, book)
    mode = _mode(devices, policy, book)
    _count(devices, policy, book)
    _endorsed(devices, endorsements, device_root, rim_root, now, book)
    _topology(devices, mode, book)
    _lists(devices, policy, book)
    if book.failed:
        return None
    return GpuFacts(tuple(_facts(d) for d in devices), mode or "", min(book.ends, default=0))


def _labelled(evidence: GpuEvidence) -> list[_Device]:
    """Devices with the names people know them by: GPU 0, GPU 1, …, switch 0, …"""
    seen = {"gpu": 0, "switch": 0}
    found = []
    for device in evidence.devices:
        name = "GPU" if device.kind == "gpu" else "switch"
        found.append(_Device(f"{name} {seen[device.kind]}", device))
        seen[device.kind] += 1
    return found


def _parse(devices: list[_Device], book: _Book) -> None:
    """(1). Not subject to the policy: what does not parse cannot be accepted for any other reason."""
    gpus = sum(d.gpu for d in devices)
    if not devices or gpus > MAX_GPUS or len(devices) - gpus > MAX_SWITCHES:
        err = FormatError("FORMAT_GPU_COUNT", "an impossible number of devices", actual=len(devices))
        book.fail("parse", "evidence", err, _RATLS)

    def judge(device: _Device) -> str:
        report = Report.parse(device.raw.report)
        if report.kind != device.raw.kind:
            raise FormatError(
                "FORMAT_GPU_KIND", "the report is of another kind of device", expected=device.raw.kind,
                actual=report.kind,
            )  # fmt: skip
        device.report = report
        return f"{len(device.raw.report)} bytes"

    book.each("parse", devices, "the report is well formed", _SPDM, judge)


def _nonce(device: _Device, nonce: bytes) -> str:
    """(2). A report for another nonce is a replay, or was fetched from an honest node."""
    found = device.need_report().nonce
    if len(nonce) != 32 or not hmac.compare_digest(found, nonce):
        raise RefusedError("GPU_NONCE", "the report was made for another nonce", expected=nonce, actual=found)
    return found.hex()


def _sign(device: _Device) -> str:
    """(3)."""
    report, ak = device.need_report(), device.need_certificate(0)
    r, s = int.from_bytes(report.signature[:48], "big"), int.from_bytes(report.signature[48:], "big")
    try:
        ak.key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise RefusedError("GPU_SIGNATURE", "the report's signature does not verify under the chain's leaf") from None
    return "ECDSA P-384"


def _chain(device: _Device, root: bytes, now: int, book: _Book) -> str:
    """(4)."""
    device.chain = check_chain(device.raw.chain, root=root, length=CHAIN, now=now, code="GPU_CHAIN")
    book.ends.append(min(c.not_after for c in device.chain))
    return device.chain[1].serial


def _fwid(devices: list[_Device], book: _Book) -> None:
    """(5)."""
    if not book.wants("fwid"):
        return

    def judge(device: _Device) -> str:
        shown = device.need_report().fwid
        if shown is None:
            raise RefusedError(
                "GPU_FWID", "the report carries no firmware id", hint="drivers before 550 do not report it"
            )
        certified = certified_fwid(device.need_certificate(0))
        if shown != certified:
            raise RefusedError("GPU_FWID", "the key was certified for other firmware", expected=certified, actual=shown)
        return shown.hex()

    gpus = [d for d in devices if d.gpu]
    book.each("fwid", gpus, "the key was certified for this firmware", _DICE, judge)
    _some(gpus, "fwid", book)


def _distinct(devices: list[_Device], book: _Book) -> None:
    """(6). One GPU shown twice would count for two."""
    if not book.wants("distinct"):
        return
    serials: dict[str, str] = {}
    keys: dict[bytes, str] = {}

    def judge(device: _Device) -> str:
        ak, ik = device.need_certificate(0), device.need_certificate(1)
        twin = serials.get(ik.serial) or keys.get(ik.key_bits) or keys.get(ak.key_bits)
        if twin is not None:
            raise RefusedError(
                "GPU_DUPLICATE", f"the same device as {twin}", expected="another device", actual=ik.serial
            )
        serials[ik.serial] = keys[ik.key_bits] = keys[ak.key_bits] = device.label
        return ik.serial

    book.each("distinct", devices, "a device of its own", _RATLS, judge)


def _mode(devices: list[_Device], policy: GpuPolicy, book: _Book) -> Mode | None:
    """(7). The one mode of all GPUs, whether or not the stage decides; None when there is none."""
    gpus = [d for d in devices if d.gpu]
    wanted = policy.mode

    def judge(device: _Device) -> str:
        device.mode = device_mode(device.need_report())
        expected = gpus[0].mode if isinstance(wanted, Skip) else wanted
        if device.mode != expected:
            raise RefusedError("GPU_MODE", "another mode than asked for", expected=expected, actual=device.mode)
        return device.mode

    if book.wants("mode"):
        if isinstance(wanted, Skip):
            book.checks.skip("gpu.mode", f"no mode is asked for, one must be clear: {wanted.why}", cite=_POLICY)
        book.each("mode", gpus, "the mode is clear and the one asked for", _PPCIE, judge)
        _some(gpus, "mode", book)
    else:
        for device in gpus:
            try:
                device.mode = device_mode(device.need_report())
            except RefusedError:
                device.mode = None
    modes = {d.mode for d in gpus}
    return modes.pop() if len(modes) == 1 else None


def _count(devices: list[_Device], policy: GpuPolicy, book: _Book) -> None:
    """(8). A subset attested, another used: the count is the policy's, not the evidence's."""
    if not book.wants("count"):
        return
    gpus = sum(d.gpu for d in devices)
    for what, wanted, actual in (("GPUs", policy.count, gpus), ("switches", policy.switches, len(devices) - gpus)):
        if isinstance(wanted, Skip):
            book.checks.skip("gpu.count", f"{what}: {wanted.why}", cite=_POLICY)
        elif wanted != actual:
            err = RefusedError("GPU_COUNT", f"another number of {what}", expected=wanted, actual=actual)
            book.fail("count", "evidence", err, _POLICY)
        else:
            book.run("count", "evidence", f"as many {what} as expected", _POLICY, partial(str, actual))


def _endorsed(
    devices: list[_Device], endorsements: GpuEndorsements, device_root: bytes, rim_root: bytes, now: int, book: _Book
) -> None:
    """(9) and (10)."""

    def signers(device: _Device) -> str:
        names = rim_ids(device.need_report())
        for name in names:
            chain = _rim(name, endorsements, rim_root).chain[:SIGNERS]
            _revocation((c.der for c in chain), rim_root, answers, now, book)
        return ", ".join(names)

    rim, ocsp_device, ocsp_rim = (book.wants(stage) for stage in ("rim", "ocsp_device", "ocsp_rim"))
    answers = OcspAnswers({})
    if ocsp_device or ocsp_rim:
        try:
            answers = OcspAnswers(endorsements.ocsp)
        except FormatError as err:
            book.fail("ocsp_device" if ocsp_device else "ocsp_rim", "endorsements", err, _OCSP)
    if rim:
        for device in devices:
            _golden(device, endorsements, rim_root, now, book)
    if ocsp_device:
        book.each(
            "ocsp_device", devices, "identity, issuer and product certificates are good", _OCSP,
            lambda d: _revocation(d.raw.chain[1:], device_root, answers, now, book),
        )  # fmt: skip
    if ocsp_rim:
        book.each("ocsp_rim", devices, "the signers of its RIMs are good", _OCSP, signers)


def _rim(name: str, endorsements: GpuEndorsements, root: bytes) -> Rim:
    xml = endorsements.rims.get(name)
    if xml is None:
        raise RefusedError(
            "GPU_RIM_MISSING", f"no RIM {name}", expected=name, actual=f"{len(endorsements.rims)} others"
        )
    return Rim.parse(xml, root=root)


def _golden(device: _Device, endorsements: GpuEndorsements, root: bytes, now: int, book: _Book) -> None:
    """(9) for one device: each RIM for itself, so that a missing one does not hide what another one shows."""
    found: list[Rim] = []

    def judge(name: str, version: str) -> str:
        rim = _rim(name, endorsements, root)
        found.append(rim)
        end = rim.valid_at(now)
        seen = compare(device.need_report(), rim, version)
        book.ends.append(end)
        return f"{seen} measurements"

    def disjoint() -> str:
        both = sorted(set(found[0].golden) & set(found[1].golden))
        if both:
            raise RefusedError("GPU_RIM_OVERLAP", "measurements are active in both RIMs", expected="none", actual=both)
        return "disjoint"

    if device.report is None:
        book.run("rim", device.label, "", _XML, lambda: device.need_report().vbios_version)
        return
    for name, version in zip(rim_ids(device.report), rim_versions(device.report), strict=True):
        reason = "every active measurement equals a golden value"
        book.run("rim", f"{device.label}, {name}", reason, _XML, partial(judge, name, version))
    if len(found) == 2:
        book.run("rim", device.label, "no measurement is active in both RIMs", _XML, disjoint)


def _revocation(ders: Iterable[bytes], root: bytes, answers: OcspAnswers, now: int, book: _Book) -> str:
    """(10) for a chain below *root*, root not asked about: nobody above it could answer."""
    chain = [Certificate.parse(der) for der in (*ders, root)]
    if len(chain) != CHAIN:
        raise RefusedError("GPU_CHAIN_LENGTH", "another number of certificates", expected=CHAIN, actual=len(chain))
    ends = [answers.check(cert, issuer, now=now) for cert, issuer in pairwise(chain)]
    book.ends.append(min(ends))
    return f"good until {min(ends)}"


def _topology(devices: list[_Device], mode: Mode | None, book: _Book) -> None:
    """(11)."""
    if not book.wants("topology"):
        return

    def judge() -> str:
        if mode is None:
            raise RefusedError("GPU_TOPOLOGY", "there is no one mode, so no topology to compare with")
        check_topology(
            mode, [d.need_report() for d in devices if d.gpu], [d.need_report() for d in devices if not d.gpu]
        )
        return mode

    reason = "GPUs and switches see each other as the mode needs (counted: GPUs do not report their own id)"
    if mode in ("spt", "mpt"):
        reason = f"not applicable in mode {mode}: no plaintext NVLink fabric, and the evidence shows none"
    book.run("topology", "evidence", reason, _PPCIE, judge)


def _lists(devices: list[_Device], policy: GpuPolicy, book: _Book) -> None:
    """(12). Old drivers that NVIDIA signed pass everything above: only a list keeps them out."""
    gpus = [d for d in devices if d.gpu]
    for name, allowed, held, read in (
        # Switches run firmware only: their version is held to the vbios list.
        ("driver", policy.drivers, gpus, lambda d: d.need_report().driver_version),
        ("vbios", policy.vbios, devices, lambda d: d.need_report().vbios_version),
        ("hwmodel", policy.hwmodels, devices, lambda d: d.need_certificate(1).common_name),
    ):
        if isinstance(allowed, Skip):
            book.checks.skip(f"gpu.{name}", allowed.why, cite=_POLICY)
        else:
            book.each(name, held, f"{name} is one the policy allows", _POLICY, partial(_listed, name, allowed, read))


def _listed(name: str, allowed: frozenset[str], read: Callable[[_Device], str], device: _Device) -> str:
    actual = read(device)
    if actual not in allowed:
        raise RefusedError(
            f"GPU_{name.upper()}", f"{name} is not one the policy allows", expected=", ".join(sorted(allowed)),
            actual=actual or "nothing",
        )  # fmt: skip
    return actual


def _some(devices: list[_Device], stage: str, book: _Book) -> None:
    if not devices:
        err = RefusedError("GPU_ABSENT", f"no GPU in the evidence: nothing for the stage {stage} to look at")
        book.fail(stage, "evidence", err, _RATLS)


def _facts(device: _Device) -> GpuDeviceFacts:
    report, ik = device.need_report(), device.need_certificate(1)
    return GpuDeviceFacts(
        device.raw.kind, report.driver_version, report.vbios_version, ik.common_name, ik.serial, device.mode
    )


def _id(stage: str) -> str:
    return "gpu." + stage.replace("_", "-")
