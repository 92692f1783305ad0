"""The quote parser takes one form of each quote and refuses every other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import FormatError
from attestation.tdx import Quote, canonical_length
from attestation.tdx.quote import MAX_QUOTE
from tests.attestation.tdx.dev import REPORT_DATA, extended_quote, tee, tell
from tests.devtee.tdx import QuoteForm

N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Order of P-256."""


def v4() -> bytes:
    return tee().quote(REPORT_DATA)


def v5() -> bytes:
    return tee().quote(REPORT_DATA, version=5)


def put(raw: bytes, at: int, form: str, value: int) -> bytes:
    out = bytearray(raw)
    struct.pack_into(form, out, at, value)
    return bytes(out)


def grow(raw: bytes, sig_at: int, tail: bytes) -> bytes:
    """Append *tail* to the PEM chain and adjust every length, which no signature covers."""
    sig_len = struct.unpack_from("<I", raw, sig_at)[0] + len(tail)
    out = bytearray(raw + tail)
    data = sig_at + 4
    struct.pack_into("<I", out, sig_at, sig_len)
    struct.pack_into("<I", out, data + 130, sig_len - 134)
    struct.pack_into("<I", out, data + 618, sig_len - 622)
    return bytes(out)


@pytest.mark.parametrize(("make", "body_type"), [(v4, 2), (v5, 3), (extended_quote, 4)])
def test_every_kind_of_quote_is_read(make: Callable[[], bytes], body_type: int) -> None:
    raw = make()
    quote = Quote.parse(raw)
    assert (quote.body_type, quote.raw, quote.body.report_data) == (body_type, raw, REPORT_DATA)
    assert quote.body.rtmrs == tee().td.rtmr and quote.body.mrtd == tee().td.mrtd
    assert len(quote.pck_chain) == 3 and quote.pck_chain[2] == tee().roots.intel
    assert (quote.body.mrservicetd is None) == (body_type == 2)
    assert (quote.body.td_id is None) == (body_type != 4)


def test_extended_fields_are_read_from_their_places() -> None:
    given_fields = {
        "vm_id": b"\x07", "td_id": b"\x01" * 32, "device_info_hash": b"\x02" * 48, "init_cpusvn": b"\x03" * 16,
        "init_tee_tcb_svn": b"\x04" * 16, "init_fmspc": b"\x05" * 12,
    }  # fmt: skip
    body = Quote.parse(extended_quote(**given_fields)).body
    assert body.vm_id == 7
    assert {k: getattr(body, k) for k in given_fields if k != "vm_id"} == {
        k: v for k, v in given_fields.items() if k != "vm_id"
    }


REFUSED = [
    ("empty", lambda q: b"", "FORMAT_TDX_SIZE"),
    ("header only", lambda q: q[:48], "FORMAT_TDX_SIZE"),
    ("longer than any quote", lambda q: q + bytes(MAX_QUOTE), "FORMAT_TDX_SIZE"),
    ("version 3", lambda q: put(q, 0, "<H", 3), "FORMAT_TDX_VERSION"),
    ("version 6", lambda q: put(q, 0, "<H", 6), "FORMAT_TDX_VERSION"),
    ("another key type", lambda q: put(q, 2, "<H", 3), "FORMAT_TDX_KEY_TYPE"),
    ("an SGX quote", lambda q: put(q, 4, "<I", 0), "FORMAT_TDX_TEE_TYPE"),
    ("reserved header bytes", lambda q: put(q, 8, "<I", 1), "FORMAT_TDX_RESERVED"),
    ("another QE vendor", lambda q: put(q, 12, "<I", 0), "FORMAT_TDX_QE_VENDOR"),
    ("cut in the body", lambda q: q[:300], "FORMAT_TDX_LENGTH"),
    ("last byte cut", lambda q: q[:-1], "FORMAT_TDX_LENGTH"),
    ("one byte more", lambda q: q + b"\0", "FORMAT_TDX_LENGTH"),
    ("sig_len one more", lambda q: put(q, 632, "<I", len(q) - 636 + 1), "FORMAT_TDX_LENGTH"),
    ("sig_len huge", lambda q: put(q, 632, "<I", 0xFFFFFFFF), "FORMAT_TDX_LENGTH"),
    ("sig_len without room", lambda q: put(q[:700], 632, "<I", 64), "FORMAT_TDX_LENGTH"),
    ("another outer type", lambda q: put(q, 636 + 128, "<H", 5), "FORMAT_TDX_CERTIFICATION"),
    ("another outer size", lambda q: put(q, 636 + 130, "<I", 9), "FORMAT_TDX_CERTIFICATION"),
    ("another auth size", lambda q: put(q, 636 + 582, "<H", 31), "FORMAT_TDX_QE_AUTH"),
    ("another inner type", lambda q: put(q, 636 + 616, "<H", 6), "FORMAT_TDX_CERTIFICATION"),
    ("another inner size", lambda q: put(q, 636 + 618, "<I", 9), "FORMAT_TDX_CERTIFICATION"),
    ("reserved bytes of the QE report", lambda q: put(q, 636 + 134 + 20, "<B", 1), "FORMAT_TDX_RESERVED"),
    ("two NUL after the chain", lambda q: grow(q, 632, b"\0"), "FORMAT_TDX_PCK_CHAIN"),
    ("text after the chain", lambda q: grow(q, 632, b"\n#"), "FORMAT_TDX_PCK_CHAIN"),
    ("CRLF in the chain", lambda q: grow(q, 632, b"\r\n"), "FORMAT_TDX_PCK_CHAIN"),
]


@pytest.mark.parametrize(("change", "code"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_any_other_form_is_refused(change: Callable[[bytes], bytes], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        Quote.parse(change(v4()))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("offset", "form", "value", "code"),
    [
        (48, "<H", 1, "FORMAT_TDX_BODY_TYPE"),
        (48, "<H", 5, "FORMAT_TDX_BODY_TYPE"),
        (48, "<H", 2, "FORMAT_TDX_BODY_SIZE"),
        (50, "<I", 584, "FORMAT_TDX_BODY_SIZE"),
        (50, "<I", 0xFFFFFFFF, "FORMAT_TDX_BODY_SIZE"),
    ],
)
def test_body_of_another_type_or_size_is_refused(offset: int, form: str, value: int, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        Quote.parse(put(v5(), offset, form, value))
    assert caught.value.code == code


def test_chain_spelled_another_way_is_refused() -> None:
    """The same certificates with another line length: the library reads them, no signature covers the difference."""
    raw = v4()
    at = raw.index(b"-----BEGIN CERTIFICATE-----\n") + 28
    moved = bytearray(raw)
    moved[at + 63], moved[at + 64] = moved[at + 64], moved[at + 63]  # the first line break one character earlier
    with pytest.raises(FormatError) as caught:
        Quote.parse(bytes(moved))
    assert caught.value.code == "FORMAT_TDX_PCK_CHAIN"


def test_identity_is_that_of_what_was_signed() -> None:
    """The second form of an ECDSA signature and the final NUL make other bytes, not other evidence."""
    raw = v4()
    quote = Quote.parse(raw)
    s = int.from_bytes(quote.signature[32:])
    other = raw[: 636 + 32] + (N - s).to_bytes(32) + raw[636 + 64 :]
    assert other != raw and tell(quote=other).accepted
    assert Quote.parse(other).identity == quote.identity
    without = raw[:-1]
    for at, size in ((632, 636), (636 + 130, 636 + 134), (636 + 618, 636 + 622)):
        without = put(without, at, "<I", len(without) - size)
    assert Quote.parse(without).identity == quote.identity and tell(quote=without).accepted
    changed = tee().quote(bytes(64))
    assert Quote.parse(changed).identity != quote.identity


def test_identity_covers_the_platform() -> None:
    """Two platforms that sign the same TD report are two pieces of evidence."""
    quote = Quote.parse(v4())
    assert replace(quote, pck_chain=(b"another", *quote.pck_chain[1:])).identity != quote.identity
    assert replace(quote, qe_auth_data=bytes(32)).identity != quote.identity


@pytest.mark.parametrize("make", [v4, v5, extended_quote])
@pytest.mark.parametrize("padding", [0, 1, 70, 3000])
def test_padding_is_measured_and_nothing_but_zero_is_padding(make: Callable[[], bytes], padding: int) -> None:
    raw = make()
    assert canonical_length(raw + bytes(padding)) == len(raw)
    with pytest.raises(FormatError):
        canonical_length(raw + bytes(padding) + b"\1")


def test_length_that_points_outside_is_refused_before_it_is_used() -> None:
    for value in (0, 600, 0x7FFFFFFF, 0xFFFFFFFF):
        with pytest.raises(FormatError):
            canonical_length(put(v4(), 632, "<I", value) + bytes(100))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_never_crash_the_parser(raw: bytes) -> None:
    for reader in (Quote.parse, canonical_length):
        with pytest.raises(FormatError):
            reader(raw)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 700), st.binary(min_size=1, max_size=40), st.sampled_from([4, 5]))
def test_overwritten_frames_are_read_or_refused_and_nothing_else(at: int, patch: bytes, version: int) -> None:
    raw = bytearray(v4() if version == 4 else v5())
    raw[at : at + len(patch)] = patch
    try:
        quote = Quote.parse(bytes(raw))
    except FormatError:
        return
    assert quote.raw == raw


def test_form_is_not_evidence() -> None:
    """A well-formed quote under other keys parses, and is refused by appraisal."""
    assert not tell(form=QuoteForm(signer="intel-tcb-signing")).accepted
