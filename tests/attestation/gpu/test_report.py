"""The report parser reads every byte or refuses; a real report with any changed byte is not accepted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import FormatError
from attestation.gpu import Report
from tests.attestation.gpu.judge import genuine, told
from tests.devtee.gpu import GpuForm
from tests.vectors import VECTORS, need_vectors

ALL = os.environ.get("VOUCHSAFE_SWEEP") == "all"
SAMPLE = 250
RECORD = 45 + 64 * 55
OPAQUE = RECORD + 32


def vector(name: str) -> Path:
    need_vectors()
    return VECTORS / "gpu" / name


def honest(form: GpuForm | None = None) -> bytes:
    return told(form or GpuForm()).evidence.devices[0].report


def patched(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def refused(raw: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        Report.parse(raw)
    assert caught.value.code.startswith("FORMAT_GPU_")
    return caught.value.code


@pytest.mark.vectors
def test_fields_of_a_real_h100_report() -> None:
    report = Report.parse(genuine(vector("h100-550.90.07-full")).evidence.devices[0].report)
    assert (report.kind, report.driver_version, report.vbios_version) == ("gpu", "550.90.07", "96.00.9F.00.01")
    assert (report.chip, report.project, report.project_sku, report.chip_sku) == ("GH100", "1010", "0200", "882")
    assert (report.protected_pcie, report.feature_flag, report.nvdec0) == (0x55, None, 0x55)
    assert report.fwid is not None and report.fwid.hex().startswith("f5c384ae")
    assert len(report.measurements) == 64 and set(report.measurements) == set(range(64))
    assert report.signed + report.signature == genuine(vector("h100-550.90.07-full")).evidence.devices[0].report
    assert not report.switch_pdis and not report.gpu_pdis


@pytest.mark.vectors
def test_fields_of_a_real_protected_pcie_node() -> None:
    devices = [Report.parse(d.report) for d in genuine(vector("h100x8-ls10x4-590.12")).evidence.devices]
    gpu, switch = devices[0], devices[8]
    assert (gpu.protected_pcie, gpu.feature_flag, len(gpu.switch_pdis), gpu.gpu_pdis) == (0xAA, 2, 18, ())
    assert (switch.kind, switch.chip, switch.driver_version, switch.vbios_version) == (
        "switch", "LS10", "", "96.10.73.00.01",
    )  # fmt: skip
    assert len(switch.measurements) == 31 and len(switch.switch_pdis) == 1 and len(switch.gpu_pdis) == 8
    assert switch.fwid is None and switch.feature_flag is None


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("empty", lambda r: b"", "FORMAT_GPU_SIZE"),
        ("huge", lambda r: r + bytes(8192), "FORMAT_GPU_SIZE"),
        ("spdm 1.2", lambda r: patched(r, 0, b"\x12"), "FORMAT_GPU_HEADER"),
        ("another request", lambda r: patched(r, 1, b"\xe1"), "FORMAT_GPU_HEADER"),
        ("no signature asked for", lambda r: patched(r, 2, b"\0"), "FORMAT_GPU_HEADER"),
        ("one measurement asked for", lambda r: patched(r, 3, b"\1"), "FORMAT_GPU_HEADER"),
        ("slot 1", lambda r: patched(r, 36, b"\1"), "FORMAT_GPU_HEADER"),
        ("another response", lambda r: patched(r, 38, b"\x7f"), "FORMAT_GPU_HEADER"),
        ("response version", lambda r: patched(r, 37, b"\x10"), "FORMAT_GPU_HEADER"),
        ("63 blocks", lambda r: patched(r, 41, b"\x3f"), "FORMAT_GPU_BLOCK"),
        ("31 blocks in a GPU's record", lambda r: patched(r, 41, b"\x1f"), "FORMAT_GPU_LENGTH"),
        ("record too short", lambda r: patched(r, 42, b"\xbf"), "FORMAT_GPU_LENGTH"),
        ("record of 16 MiB", lambda r: patched(r, 42, b"\xff\xff\xff"), "FORMAT_GPU_LENGTH"),
        ("duplicate index", lambda r: patched(r, 45 + 55, b"\1"), "FORMAT_GPU_BLOCK"),
        ("indices exchanged", lambda r: patched(patched(r, 45, b"\2"), 45 + 55, b"\1"), "FORMAT_GPU_BLOCK"),
        ("raw measurement", lambda r: patched(r, 45 + 4, b"\x81"), "FORMAT_GPU_BLOCK"),
        ("block size", lambda r: patched(r, 45 + 2, b"\x34"), "FORMAT_GPU_BLOCK"),
        ("value size", lambda r: patched(r, 45 + 5, b"\x2f"), "FORMAT_GPU_BLOCK"),
        ("opaque too short", lambda r: patched(r, OPAQUE, b"\0\0"), "FORMAT_GPU_LENGTH"),
        ("opaque too long", lambda r: patched(r, OPAQUE, b"\xff\xff"), "FORMAT_GPU_LENGTH"),
        ("value beyond the list", lambda r: patched(r, OPAQUE + 4, b"\xff\xff"), "FORMAT_GPU_OPAQUE"),
        ("duplicate opaque type", lambda r: patched(r, OPAQUE + 2, b"\x0e"), "FORMAT_GPU_OPAQUE"),
        ("trailing byte", lambda r: r + b"\0", "FORMAT_GPU_LENGTH"),
        ("last byte missing", lambda r: r[:-1], "FORMAT_GPU_LENGTH"),
        ("cut at the opaque length", lambda r: r[: OPAQUE + 1] + bytes(96), "FORMAT_GPU_LENGTH"),
    ],
)
def test_report_of_another_form_is_refused(name: str, change: object, code: str) -> None:
    assert callable(change)
    assert refused(change(honest())) == code


@pytest.mark.parametrize(
    "form",
    [
        GpuForm(nvdec0=0),
        GpuForm(nvdec0=1),
        GpuForm(protected_pcie=0),
        GpuForm(driver="550.90.07/../../etc"),
        GpuForm(driver=""),
        GpuForm(driver="5" * 64),
        GpuForm(project="10 10"),
        GpuForm(fwid=bytes(47)),
        GpuForm(extra_opaque=((20, bytes(48)),)),
        GpuForm(extra_opaque=((22, bytes(143)),)),
        GpuForm(extra_opaque=((36, b"\2"),)),
        GpuForm(extra_opaque=((35, b"GB\xff\x00"),)),
    ],
)
def test_opaque_value_of_another_form_is_refused_even_when_signed(form: GpuForm) -> None:
    """A status that is neither on nor off is neither; a version that names a path would name a file."""
    assert refused(honest(form)) == "FORMAT_GPU_OPAQUE"


def test_opaque_types_of_newer_drivers_are_kept() -> None:
    report = Report.parse(honest(GpuForm(extra_opaque=((34, b"\1\0"), (35, b"GB100\0"), (200, b"")))))
    assert report.opaque[34] == b"\1\0" and report.chip == "GB100" and report.opaque[200] == b""


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["h100-550.90.07-full", "ls10-96.10.55.00.01"])
def test_no_changed_byte_of_a_real_report_is_accepted(name: str) -> None:
    story = genuine(vector(name))
    assert story.judge().accepted
    raw = story.evidence.devices[0].report
    pick = random.Random(name)
    frame = [*range(4), *range(36, 52), *range(len(raw) - 98, len(raw))]
    tried = 0
    for at in range(len(raw)) if ALL else [*frame, *pick.sample(range(len(raw)), SAMPLE)]:
        changed = patched(raw, at, bytes([raw[at] ^ (1 << pick.randrange(8))]))
        verdict = story.with_device(0, report=changed).judge()
        assert not verdict.accepted, f"offset {at} was accepted"
        tried += 1
    assert tried >= SAMPLE


@given(st.binary(max_size=600) | st.builds(lambda a, b: honest()[:a] + b, st.integers(0, 4117), st.binary(max_size=64)))
@settings(max_examples=200, deadline=None)
def test_random_bytes_give_a_report_or_a_format_error(raw: bytes) -> None:
    try:
        report = Report.parse(raw)
    except FormatError as err:
        assert err.code.startswith("FORMAT_GPU_")
    else:
        assert report.signed + report.signature == raw
