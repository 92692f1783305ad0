"""The carried form: one encoding, every length capped before it is acted on."""

from __future__ import annotations

import base64
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation import cbor
from attestation.errors import FormatError
from attestation.gpu import GpuDevice, GpuEvidence, decode, encode, from_nvidia_json
from tests.attestation.gpu.judge import NONCE, tee, told
from tests.devtee.gpu import GpuForm


def fake(number: int = 0, kind: Any = "gpu", upper: int = 0) -> GpuDevice:
    return GpuDevice(
        kind, bytes([number]) * 400, (bytes([1, number]), bytes([2, number]), b"ica%d" % upper, b"identity")
    )


def plain(evidence: GpuEvidence) -> dict[str, Any]:
    value = cbor2.loads(zlib.decompress(encode(evidence)))
    assert isinstance(value, dict)
    return value


def carried(value: object) -> bytes:
    return zlib.compress(cbor2.dumps(value, canonical=True), 9)


def refused(raw: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        decode(raw)
    return caught.value.code


def test_evidence_has_the_form_of_the_profile() -> None:
    devices = (fake(0), fake(1, upper=1), fake(2), fake(3, "switch", 1))
    value = plain(GpuEvidence(devices))
    assert value["chains"] == [[b"ica0", b"identity"], [b"ica1", b"identity"]]
    assert [d["chain"] for d in value["devices"]] == [0, 1, 0, 1]
    assert value["devices"][3] == {"kind": "switch", "chain": 1, "ak": b"\1\3", "ik": b"\2\3", "report": b"\3" * 400}
    assert decode(encode(GpuEvidence(devices))) == GpuEvidence(devices)


def test_encoding_is_one_zlib_stream_of_deterministic_cbor() -> None:
    raw = encode(told(GpuForm(), GpuForm()).evidence)
    inflater = zlib.decompressobj()
    item = inflater.decompress(raw)
    assert inflater.eof and not inflater.unused_data
    assert cbor.encode(cbor.decode(item, max_size=1 << 18)) == item


DEVICE = {"kind": "gpu", "chain": 0, "ak": b"ak", "ik": b"ik", "report": b"report"}
UPPER = [b"ica", b"identity"]


def shape(**fields: Any) -> bytes:
    return carried({"chains": [UPPER], "devices": [DEVICE]} | fields)


def test_the_shape_that_the_cases_start_from_is_accepted() -> None:
    assert decode(shape()).devices[0].chain == (b"ak", b"ik", b"ica", b"identity")


@pytest.mark.parametrize(
    ("name", "raw", "code"),
    [
        ("empty", b"", "FORMAT_GPU_ZLIB"),
        ("no zlib", b"not zlib at all", "FORMAT_GPU_ZLIB"),
        ("raw deflate", zlib.compressobj(9, zlib.DEFLATED, -15).compress(b"x" * 500), "FORMAT_GPU_ZLIB"),
        ("cut short", shape()[:-1], "FORMAT_GPU_ZLIB"),
        ("wrong checksum", shape()[:-1] + bytes([shape()[-1] ^ 1]), "FORMAT_GPU_ZLIB"),
        ("bytes after the stream", shape() + b"\0", "FORMAT_GPU_ZLIB"),
        ("a second stream", shape() + shape(), "FORMAT_GPU_ZLIB"),
        ("too long as carried", bytes(64 * 1024 + 1), "FORMAT_GPU_SIZE"),
        ("nothing inside", zlib.compress(b""), "FORMAT_GPU_CBOR"),
        ("trailing CBOR", zlib.compress(zlib.decompress(shape()) + b"\0"), "FORMAT_GPU_CBOR"),
        ("long form of a length", zlib.compress(b"\xb8\x02" + zlib.decompress(shape())[1:]), "FORMAT_GPU_CBOR"),
        ("indefinite map", zlib.compress(b"\xbf" + zlib.decompress(shape())[1:] + b"\xff"), "FORMAT_GPU_CBOR"),
        ("keys unsorted", zlib.compress(cbor2.dumps({"devices": [DEVICE], "chains": [UPPER]})), "FORMAT_GPU_CBOR"),
        ("a declared length of 4 GiB", zlib.compress(b"\xa2\x66chains\x9a\xff\xff\xff\xff"), "FORMAT_GPU_CBOR"),
        ("a byte string of 16 EiB", zlib.compress(b"\xa2\x66chains\x5b" + b"\xff" * 8), "FORMAT_GPU_CBOR"),
        ("nested 100,000 deep", zlib.compress(b"\x81" * 100_000 + b"\0"), "FORMAT_GPU_CBOR"),
        ("a tag", zlib.compress(b"\xc1" + zlib.decompress(shape())), "FORMAT_GPU_CBOR"),
        ("a float", carried({"chains": [UPPER], "devices": [DEVICE | {"chain": 0.0}]}), "FORMAT_GPU_CBOR"),
        ("a list", carried([1, 2]), "FORMAT_GPU_SHAPE"),
        ("another key", shape(more=1), "FORMAT_GPU_SHAPE"),
        ("no chains", carried({"devices": [DEVICE]}), "FORMAT_GPU_SHAPE"),
        ("empty chains", shape(chains=[]), "FORMAT_GPU_COUNT"),
        ("five chains", shape(chains=[[bytes([n]), b"i"] for n in range(1, 6)]), "FORMAT_GPU_COUNT"),
        ("a chain of one", shape(chains=[[b"ica"]]), "FORMAT_GPU_SHAPE"),
        ("a chain with the root", shape(chains=[[b"ica", b"identity", b"root"]]), "FORMAT_GPU_COUNT"),
        ("a chain twice", shape(chains=[UPPER, UPPER]), "FORMAT_GPU_SHAPE"),
        ("a chain nobody uses", shape(chains=[UPPER, [b"x", b"y"]]), "FORMAT_GPU_ORDER"),
        ("text instead of bytes", shape(chains=[["ica", b"identity"]]), "FORMAT_GPU_SIZE"),
        ("a certificate of 5 KiB", shape(chains=[[bytes(5000), b"identity"]]), "FORMAT_GPU_SIZE"),
        ("no devices", shape(devices=[]), "FORMAT_GPU_COUNT"),
        ("17 GPUs", shape(devices=[DEVICE] * 17), "FORMAT_GPU_COUNT"),
        ("nine switches", shape(devices=[DEVICE | {"kind": "switch"}] * 9), "FORMAT_GPU_COUNT"),
        ("a switch before a GPU", shape(devices=[DEVICE | {"kind": "switch"}, DEVICE]), "FORMAT_GPU_ORDER"),
        ("an unknown kind", shape(devices=[DEVICE | {"kind": "cpu"}]), "FORMAT_GPU_SHAPE"),
        ("a kind that is a list", shape(devices=[DEVICE | {"kind": ["gpu"]}]), "FORMAT_GPU_SHAPE"),
        ("a chain that is not there", shape(devices=[DEVICE | {"chain": 1}]), "FORMAT_GPU_SHAPE"),
        ("a negative chain", shape(devices=[DEVICE | {"chain": -1}]), "FORMAT_GPU_SHAPE"),
        ("false as a chain", shape(devices=[DEVICE | {"chain": False}]), "FORMAT_GPU_SHAPE"),
        ("a report of 9 KiB", shape(devices=[DEVICE | {"report": bytes(9000)}]), "FORMAT_GPU_SIZE"),
        ("no report", shape(devices=[{k: v for k, v in DEVICE.items() if k != "report"}]), "FORMAT_GPU_SHAPE"),
        ("a device that is a list", shape(devices=[[1]]), "FORMAT_GPU_SHAPE"),
    ],
)
def test_other_form_is_refused(name: str, raw: bytes, code: str) -> None:
    assert refused(raw) == code


def test_bomb_is_refused_without_inflating_it() -> None:
    bomb = zlib.compress(bytes(48 << 20), 9)
    assert len(bomb) < 64 * 1024
    tracemalloc.start()
    began = time.monotonic()
    assert refused(bomb) == "FORMAT_GPU_SIZE"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and time.monotonic() - began < 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (replace(d[0], chain=d[0].chain[:3]),),
        lambda d: (replace(d[0], chain=(*d[0].chain, b"root")),),
        lambda d: (replace(d[0], report=bytes(8193)),),
        lambda d: (replace(d[0], kind="switch"), d[0]),
        lambda d: d * 17,
        lambda d: (),
    ],
)
def test_what_cannot_be_read_is_not_written(change: Callable[[tuple[GpuDevice, ...]], tuple[GpuDevice, ...]]) -> None:
    with pytest.raises(FormatError):
        encode(GpuEvidence(change((fake(),))))


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_give_a_format_error(raw: bytes) -> None:
    for data in (raw, zlib.compress(raw)):
        assert refused(data).startswith("FORMAT_GPU_")


# NVIDIA's JSON shape


def entry(**fields: object) -> dict[str, object]:
    return {**tee().gpu_evidence(NONCE)[0], **fields}


def pem() -> bytes:
    return base64.b64decode(str(entry()["certificate"]))


def parts(text: bytes) -> list[bytes]:
    end = b"-----END CERTIFICATE-----"
    return [p + end for p in text.split(end)[:-1]]


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def test_nvidia_json_loses_the_root_and_keeps_the_order() -> None:
    evidence = from_nvidia_json([entry()], [])
    pki = tee().pki
    assert evidence.devices[0].chain == tuple(
        pki[r].der for r in ("device-ak-0", "device-ik-0", "device-ica", "device-identity")
    )


def test_foreign_root_in_nvidia_json_is_not_dropped_silently() -> None:
    certs = parts(pem())
    certs[4] = b"\n" + tee().roots_pem["nvidia_rim"].rstrip(b"\n")
    evidence = from_nvidia_json([entry(certificate=b64(b"".join(certs)))], [])
    assert len(evidence.devices[0].chain) == 5
    verdict = replace(told(), evidence=evidence).judge()
    assert "GPU_CHAIN_LENGTH" in verdict.codes


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_short_chain_in_nvidia_json_never_becomes_a_whole_one(count: int) -> None:
    evidence = from_nvidia_json([entry(certificate=b64(b"".join(parts(pem())[:count])))], [])
    assert len(evidence.devices[0].chain) == count - 1
    assert "GPU_CHAIN_LENGTH" in replace(told(), evidence=evidence).judge().codes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a text", "text"),
        ("nothing", None),
        ("no certificate", {"evidence": "AAAA"}),
        ("no evidence", {"certificate": "AAAA"}),
        ("evidence that is a list", {"certificate": "AAAA", "evidence": [1]}),
        ("base64 with a blank", {"certificate": "AA AA", "evidence": "AAAA"}),
        ("URL-safe base64", {"certificate": "____", "evidence": "AAAA"}),
        ("no PEM", {"certificate": b64(b"hello"), "evidence": "AAAA"}),
        ("an arch that is a number", {"certificate": "AAAA", "evidence": "AAAA", "arch": 9}),
        ("a nonce of 65 characters", {"certificate": "AAAA", "evidence": "AAAA", "nonce": "0" * 65}),
        ("a certificate of a megabyte", {"certificate": "A" * (1 << 20), "evidence": "AAAA"}),
        ("a report of a megabyte", {"certificate": "", "evidence": "A" * (1 << 20)}),
    ],
)
def test_other_json_is_refused(name: str, value: object) -> None:
    with pytest.raises(FormatError) as caught:
        from_nvidia_json([value], [])
    assert caught.value.code in ("FORMAT_GPU_JSON", "FORMAT_GPU_PEM")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: b"text before\n" + t,
        lambda t: t + b"\ntext after",
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: t.replace(b"-----BEGIN CERTIFICATE-----\nMI", b"-----BEGIN CERTIFICATE-----\nXX", 1),
        lambda t: t + b"\n" + t,
    ],
)
def test_other_pem_is_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FormatError) as caught:
        from_nvidia_json([entry(certificate=b64(change(pem())))], [])
    assert caught.value.code == "FORMAT_GPU_PEM"


@pytest.mark.parametrize(("gpus", "switches"), [(0, 0), (17, 0), (1, 9)])
def test_other_numbers_of_devices_are_refused(gpus: int, switches: int) -> None:
    with pytest.raises(FormatError) as caught:
        from_nvidia_json([entry()] * gpus, [entry()] * switches)
    assert caught.value.code == "FORMAT_GPU_COUNT"
