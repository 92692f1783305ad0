"""Quotes: framing, signatures, the TD report, the quoting enclave and the PCK chain."""

from __future__ import annotations

from attestation.tdx.quote import MAX_QUOTE
from tests.attestation.tdx.dev import DAY, NOW, extended_quote, tee
from tests.conformance.book import Book, b64
from tests.conformance.tdx_machine import flip, grow, honest, platform, put, quote, stranger, td_quote
from tests.devtee.pki import utc
from tests.devtee.tdx import OLD_TEE_TCB_SVN, QuoteForm

__all__ = ["quote_rows"]

F = QuoteForm
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Order of P-256."""
DCAP = "Intel TDX DCAP Quoting Library API, appendix Quote Format"
ABI = "Intel TDX Module ABI Reference"
PCK = "Intel SGX PCK Certificate and CRL Profile Specification"
TCB = "Intel PCS API v4, TCB Info V3"

BITS = {
    0: "DEBUG", 4: "HGS_PLUS_PROF", 5: "PERF_PROF", 6: "PMT_PROF", 16: "ICSSD", 17: "SERVTD_EXT", 27: "LASS",
    29: "MIGRATABLE", 30: "PKS", 31: "KL", 62: "TPA", 63: "PERFMON",
}  # fmt: skip


def quote_rows(book: Book) -> None:
    """All rows about the quote, controls first."""
    book.clause = DCAP
    book.control("v4", "an honest version 4 quote, TD report 1.0", honest())
    book.control("v5", "an honest version 5 quote, TD report 1.5", honest(quote(F(version=5, body="1.5"))))
    book.control("v5-report-1.0", "an honest version 5 quote, TD report 1.0", honest(quote(F(version=5))))
    book.control("v5-extended", "an honest version 5 quote, TD report 1.5 extended", honest(extended_quote()))
    book.accept("v4-chain-without-nul", "v4", "the PEM chain may end without NUL", quote=b64(quote(F(nul=False))))
    raw = quote()
    second = raw[: 636 + 32] + (N - int.from_bytes(raw[636 + 32 : 636 + 64])).to_bytes(32) + raw[636 + 64 :]
    book.accept("v4-second-form-of-the-signature", "v4", "r and N - s verify too (FIPS 186-5 §6.4)", quote=b64(second))
    _framing(book)
    _signatures(book)
    _platforms(book)
    _attributes(book)
    _module(book)
    _enclave(book)


def _framing(book: Book) -> None:
    q, v5 = quote(), quote(F(version=5, body="1.5"))
    length, size, form = "FORMAT_TDX_LENGTH", "FORMAT_TDX_SIZE", "FORMAT_TDX_CERTIFICATION"
    at = q.index(b"-----BEGIN CERTIFICATE-----\n") + 28
    respelled = bytearray(q)
    respelled[at + 63], respelled[at + 64] = respelled[at + 64], respelled[at + 63]
    head, data = f"{DCAP}: header", f"{DCAP}: signature data"
    for clause, name, changed, code, why in (
        (head, "empty", b"", size, "there is no quote"),
        (head, "header-alone", q[:48], size, "the quote ends after its header"),
        (head, "longer-than-any-quote", q + bytes(MAX_QUOTE), size, "sizes are capped before anything is read"),
        (head, "version-3", put(q, 0, "<H", 3), "FORMAT_TDX_VERSION", "an SGX version"),
        (head, "version-6", put(q, 0, "<H", 6), "FORMAT_TDX_VERSION", "a version nobody knows"),
        (head, "version-of-another-layout", put(q, 0, "<H", 5), "FORMAT_TDX_BODY_TYPE", "version 4 bytes read as 5"),
        (head, "key-type-p384", put(q, 2, "<H", 3), "FORMAT_TDX_KEY_TYPE", "an attestation key of another type"),
        (head, "tee-type-sgx", put(q, 4, "<I", 0), "FORMAT_TDX_TEE_TYPE", "an SGX quote is no TD"),
        (head, "reserved-header-bytes", put(q, 8, "<I", 1), "FORMAT_TDX_RESERVED", "reserved must be zero"),
        (head, "qe-vendor-of-another", put(q, 12, "<I", 0), "FORMAT_TDX_QE_VENDOR", "not Intel's quoting enclave"),
        (data, "cut-in-the-body", q[:300], length, "the quote ends inside its TD report"),
        (data, "last-byte-cut", q[:-1], length, "sig_len says one byte more"),
        (data, "one-byte-more", q + b"\0", length, "a byte that nobody accounts for"),
        (data, "padding-of-64", q + bytes(64), length, "padding is for the attester to cut"),
        (data, "sig-len-one-more", put(q, 632, "<I", len(q) - 636 + 1), length, "sig_len beyond the end"),
        (data, "sig-len-4-gib", put(q, 632, "<I", 0xFFFFFFFF), length, "an allocation of the peer's choice"),
        (data, "sig-len-without-room", put(q[:700], 632, "<I", 64), length, "no room for a PCK chain"),
        (data, "outer-certification-type-5", put(q, 764, "<H", 5), form, "the QE report would be left out"),
        (data, "outer-certification-size", put(q, 766, "<I", 9), form, "two lengths that disagree"),
        (data, "auth-data-of-31", put(q, 1218, "<H", 31), "FORMAT_TDX_QE_AUTH", "authentication data has 32 bytes"),
        (data, "inner-certification-type-6", put(q, 1252, "<H", 6), form, "not a PCK chain"),
        (data, "inner-certification-size", put(q, 1254, "<I", 9), form, "two lengths that disagree"),
        (data, "reserved-bytes-of-the-qe-report", put(q, 790, "<B", 1), "FORMAT_TDX_RESERVED", "reserved must be zero"),
        (data, "two-nul-after-the-chain", grow(q, b"\0"), "FORMAT_TDX_PCK_CHAIN", "unsigned bytes in a quote"),
        (data, "text-after-the-chain", grow(q, b"\n#"), "FORMAT_TDX_PCK_CHAIN", "unsigned bytes in a quote"),
        (data, "cr-lf-after-the-chain", grow(q, b"\r\n"), "FORMAT_TDX_PCK_CHAIN", "unsigned bytes in a quote"),
        (data, "chain-in-other-lines", bytes(respelled), "FORMAT_TDX_PCK_CHAIN", "a second spelling of one chain"),
    ):
        book.clause = clause
        book.refuse(name, "v4", code, why, quote=b64(changed))
    book.clause = f"{DCAP}: version 5 body descriptor"
    for name, changed, code, why in (
        ("body-type-sgx", put(v5, 48, "<H", 1), "FORMAT_TDX_BODY_TYPE", "an SGX report in a TDX quote"),
        ("body-type-5", put(v5, 48, "<H", 5), "FORMAT_TDX_BODY_TYPE", "a body nobody knows"),
        ("body-type-of-a-shorter-report", put(v5, 48, "<H", 2), "FORMAT_TDX_BODY_SIZE", "MRSERVICETD would go unread"),
        ("body-size-of-a-shorter-report", put(v5, 50, "<I", 584), "FORMAT_TDX_BODY_SIZE", "type and size disagree"),
        (
            "body-size-4-gib",
            put(v5, 50, "<I", 0xFFFFFFFF),
            "FORMAT_TDX_BODY_SIZE",
            "an allocation of the peer's choice",
        ),
    ):
        book.refuse(name, "v5", code, why, quote=b64(changed))


def _signatures(book: Book) -> None:
    q, signature = quote(), "TDX_QUOTE_SIGNATURE"
    book.clause = f"{DCAP}: ECDSA signature over header and TD report"
    for name, at, also, why in (
        ("user-data-edited", 28, (), "the header is signed too"),
        ("tee-tcb-svn-edited", 48, (), "an older module made to look newer, or the reverse"),
        ("mrseam-edited", 64, (), "another module's measurement"),
        ("mrsignerseam-edited", 112, ("TDX_MRSIGNERSEAM",), "another module signer"),
        ("seamattributes-edited", 160, ("TDX_SEAMATTRIBUTES",), "a debug module"),
        ("td-attributes-edited", 168, ("TDX_ATTRIBUTES",), "DEBUG switched on in the bytes"),
        ("xfam-edited", 176, ("TDX_XFAM",), "a CPU feature edited"),
        ("mrtd-edited", 184, (), "another firmware's measurement"),
        ("mrconfigid-edited", 232, (), "another configuration id"),
        ("mrowner-edited", 280, (), "another owner"),
        ("mrownerconfig-edited", 328, (), "another owner's configuration"),
        ("rtmr0-edited", 376, (), "another register value"),
        ("rtmr1-edited", 424, (), "another register value"),
        ("rtmr2-edited", 472, (), "another register value"),
        ("rtmr3-edited", 520, (), "another register value"),
        ("report-data-edited", 568, (), "another key in REPORTDATA"),
        ("signature-r-edited", 636, (), "a signature that does not hold"),
        ("signature-s-edited", 668, (), "a signature that does not hold"),
    ):
        book.refuse(name, "v4", signature, why, also=also, quote=b64(flip(q, at)))
    book.refuse(
        "signature-of-zeros", "v4", signature, "r = s = 0 (CVE-2022-21449)", quote=b64(q[:636] + bytes(64) + q[700:])
    )
    other = tee().quote(bytes(64))
    book.refuse(
        "body-of-another-quote", "v4", signature, "body and signature of two quotes", quote=b64(other[:632] + q[632:])
    )
    book.clause = f"{DCAP}: QE report data = SHA-256(attestation key ‖ authentication data)"
    binding = "TDX_QE_BINDING"
    book.refuse(
        "attestation-key-edited",
        "v4",
        binding,
        "a key that no quoting enclave made",
        also=(signature,),
        quote=b64(flip(q, 700)),
    )
    book.refuse("auth-data-edited", "v4", binding, "bytes under the QE report's hash", quote=b64(flip(q, 1220)))
    foreign = stranger().quote(bytes(range(64)))
    book.refuse(
        "attestation-key-of-another-machine",
        "v4",
        binding,
        "a well-signed body by a key that this QE did not certify",
        quote=b64(q[:636] + foreign[636:764] + q[764:]),
    )
    book.clause = f"{DCAP}: QE report data, second half zero"
    book.refuse(
        "qe-report-data-tail",
        "v4",
        "TDX_QE_REPORT_DATA",
        "32 bytes that nobody accounts for",
        quote=b64(quote(F(qe_report_tail=b"\1" * 32))),
    )
    book.clause = f"{DCAP}: QE report signature by the PCK key"
    qe = "TDX_QE_SIGNATURE"
    book.refuse("qe-report-edited", "v4", qe, "another enclave in the report", quote=b64(flip(q, 770 + 64)))
    book.refuse("qe-report-signature-edited", "v4", qe, "a signature that does not hold", quote=b64(flip(q, 1154)))
    book.refuse(
        "qe-report-signed-by-another-key",
        "v4",
        qe,
        "signed by another of Intel's keys",
        quote=b64(quote(F(signer="intel-tcb-signing"))),
    )
    book.clause = f"{PCK}: §1.3, roles and chain"
    tcb = ("intel-tcb-signing", "intel-platform-ca", "intel-root")
    unread = ("TDX_FMSPC", "TDX_PCE_ID")  # a certificate that is no platform's names neither
    foreign_root = ("TDX_COLLATERAL_CHAIN", "TDX_COLLATERAL_ROLE", "TDX_CRL")
    swapped = ("intel-platform-ca", "intel-pck", "intel-root")
    book.refuse(
        "chain-without-root",
        "v4",
        "FORMAT_TDX_PCK_CHAIN",
        "three certificates and no fewer",
        quote=b64(quote(F(chain=("intel-pck", "intel-platform-ca")))),
    )
    book.refuse(
        "chain-of-four",
        "v4",
        "FORMAT_TDX_PCK_CHAIN",
        "three certificates and no more",
        quote=b64(quote(F(chain=("intel-pck", "intel-platform-ca", "intel-root", "intel-root")))),
    )
    book.refuse(
        "chain-out-of-order",
        "v4",
        "TDX_PCK_ROLE",
        "a CA in the leaf's place",
        also=("TDX_COLLATERAL_ROLE", "TDX_PCK_CHAIN", "TDX_QE_SIGNATURE", *unread),
        quote=b64(quote(F(chain=swapped))),
    )
    book.refuse(
        "tcb-signer-as-pck",
        "v4",
        "TDX_PCK_ROLE",
        "a certificate made for something else",
        also=("TDX_PCK_CHAIN", *unread),
        quote=b64(quote(F(chain=tcb, signer="intel-tcb-signing"))),
    )
    book.refuse(
        "root-of-the-same-name",
        "v4",
        "TDX_PCK_CHAIN",
        "roots are compared as bytes",
        also=foreign_root,
        root=b64(stranger().roots.intel),
    )
    book.refuse(
        "root-that-is-no-certificate",
        "v4",
        "TDX_PCK_CHAIN",
        "nothing chains to it",
        also=("TDX_COLLATERAL_CHAIN", "TDX_COLLATERAL_ROLE", "TDX_SIGNATURE_LAYER"),
        root=b64(b"\x30\x00"),
    )
    book.refuse(
        "root-not-named",
        "v4",
        "TDX_PCK_CHAIN",
        "throw-away keys are nothing under Intel's own root",
        also=foreign_root,
        root=None,
    )
    book.refuse(
        "quote-of-another-machine",
        "v4",
        "TDX_PCK_CHAIN",
        "a whole quote under a root that nobody pinned",
        also=("TDX_FMSPC",),
        quote=b64(foreign),
    )


def _platforms(book: Book) -> None:
    """Other PCK certificates that the genuine CA made."""
    role = "TDX_PCK_ROLE"
    book.clause = f"{PCK}: §1.3, roles and chain"
    book.accept("pck-renewed", "v4", "another certificate for the same platform", quote=b64(platform()))
    book.refuse("pck-with-another-name", "v4", role, "the role is in the name", quote=b64(platform("Intel SGX PCK")))
    book.refuse(
        "pck-that-is-a-ca",
        "v4",
        role,
        "a leaf that issues",
        also=("TDX_COLLATERAL_CHAIN",),
        quote=b64(platform(ca=True)),
    )
    book.refuse(
        "pck-without-sgx-extension",
        "v4",
        role,
        "no platform is named",
        also=("TDX_FMSPC", "TDX_PCE_ID", "TDX_PCK_CHAIN"),
        quote=b64(platform(extension=False)),
    )
    book.refuse(
        "pck-issued-by-the-root",
        "v4",
        role,
        "platforms are issued by a PCK CA",
        quote=b64(platform(issuer="intel-root")),
    )
    book.clause = "RFC 5280 §4.1.2.5, validity"
    begin, end = utc(NOW + DAY), utc(NOW - DAY)
    book.refuse("pck-expired", "v4", "TDX_CERTIFICATE_TIME", "ended yesterday", quote=b64(platform(not_after=end)))
    book.refuse(
        "pck-of-the-future", "v4", "TDX_CERTIFICATE_TIME", "begins tomorrow", quote=b64(platform(not_before=begin))
    )


def _attributes(book: Book) -> None:
    book.clause = f"{ABI}: TDATTRIBUTES"
    for bit in (b for b in range(64) if b != 28):
        what = f"{BITS[bit]} is set" if bit in BITS else "a reserved bit is set"
        name = BITS[bit].lower().replace("_", "-") if bit in BITS else "reserved"
        book.refuse(
            f"td-attributes-bit-{bit}-{name}",
            "v4",
            "TDX_ATTRIBUTES",
            f"{what}: attributes are compared whole",
            quote=td_quote(td_attributes=0x10000000 | 1 << bit),
        )
    book.refuse(
        "td-attributes-without-sept-ve-disable",
        "v4",
        "TDX_ATTRIBUTES",
        "EPT violations would reach the TD as #VE, at the host's choice",
        quote=td_quote(td_attributes=0),
    )
    book.clause = f"{ABI}: XFAM"
    for value, why in (
        (0, "no feature at all"),
        (0x3, "AVX missing"),
        (0x600E6, "x87 missing"),
        (0xE7, "AMX missing"),
        (0x600E7 | 1 << 9 | 1 << 20, "a reserved feature"),
        (0x600E7 | 1 << 8, "processor trace"),
        (0x600E7 | 1 << 15, "LBR"),
        (1 << 63, "the highest bit alone"),
        (2**64 - 1, "every feature"),
    ):
        book.refuse(f"xfam-{value:x}", "v4", "TDX_XFAM", f"{why}: XFAM is compared whole", quote=td_quote(xfam=value))


def _module(book: Book) -> None:
    v5 = F(version=5, body="1.5")
    one = b"\1" * 48
    book.clause = f"{ABI}: TDREPORT_STRUCT; {TCB}: tdxModule, tdxModuleIdentities"
    module = ("TDX_MODULE",)
    book.refuse(
        "mrsignerseam",
        "v4",
        "TDX_MRSIGNERSEAM",
        "a TDX module that Intel did not sign",
        also=module,
        quote=td_quote(mrsignerseam=one),
    )
    book.refuse(
        "mrsignerseam-last-byte",
        "v4",
        "TDX_MRSIGNERSEAM",
        "compared to the last byte",
        also=module,
        quote=td_quote(mrsignerseam=bytes(47) + b"\1"),
    )
    book.refuse(
        "seamattributes-debug",
        "v4",
        "TDX_SEAMATTRIBUTES",
        "a debug TDX module",
        also=module,
        quote=td_quote(seam_attributes=1),
    )
    book.refuse(
        "seamattributes-highest-bit",
        "v4",
        "TDX_SEAMATTRIBUTES",
        "all 64 bits must be zero",
        also=module,
        quote=td_quote(seam_attributes=1 << 63),
    )
    book.refuse(
        "module-of-an-unknown-generation",
        "v4",
        "TDX_MODULE",
        "no identity names this major version",
        quote=td_quote(tee_tcb_svn=bytes([5, 9, 4]) + bytes(13)),
    )
    book.clause = f"{TCB}: tcbLevels"
    for name, svn, code, why in (
        ("module-of-an-old-level", OLD_TEE_TCB_SVN, "TDX_TCB_STATUS", "matches an OutOfDate level"),
        ("module-below-every-level", bytes([1, 1, 4]) + bytes(13), "TDX_MODULE", "its identity has no level so low"),
        ("seamldr-below-every-level", bytes([5, 1, 1]) + bytes(13), "TDX_TCB_LEVEL", "matches no level"),
    ):
        also = ("TDX_ADVISORY",) if code == "TDX_TCB_STATUS" else ()
        book.refuse(name, "v4", code, why, also=also, quote=td_quote(tee_tcb_svn=svn))
    book.clause = "Intel TDX DCAP: TD relaunch (TEE_TCB_SVN beside TEE_TCB_SVN2)"
    book.refuse(
        "td-that-must-be-relaunched",
        "v5",
        "TDX_TCB_STATUS",
        "the module was updated under a running TD",
        also=("TDX_ADVISORY",),
        quote=td_quote(v5, tee_tcb_svn=OLD_TEE_TCB_SVN),
    )
    book.clause = f"{ABI}: MRSERVICETD, SERVTD_HASH"
    for name, base, changed, why in (
        ("service-td", "v5", td_quote(v5, mrservicetd=one), "a migration TD is bound to this one"),
        ("service-td-last-byte", "v5", td_quote(v5, mrservicetd=bytes(47) + b"\1"), "compared to the last byte"),
        (
            "service-td-at-the-start",
            "v5-extended",
            b64(extended_quote(init_servtd_hash=one)),
            "bound when the TD was built",
        ),
        ("service-td-now", "v5-extended", b64(extended_quote(servtd_hash=one)), "bound since"),
    ):
        book.refuse(name, base, "TDX_SERVICE_TD", why, quote=changed)


def _enclave(book: Book) -> None:
    book.clause = "Intel PCS API v4, Enclave Identity V2 (TD_QE)"
    debug = b"\x17" + bytes(7) + b"\xe7" + bytes(7)
    for name, form, why in (
        ("qe-miscselect", F(qe_miscselect=1), "MISCSELECT under its mask"),
        ("qe-in-debug", F(qe_attributes=debug), "a debug enclave: its memory is readable"),
        ("qe-mrsigner", F(qe_mrsigner=bytes(32)), "an enclave of another signer"),
        ("qe-product", F(qe_prod_id=1), "another product: the SGX quoting enclave"),
        ("qe-below-every-level", F(qe_svn=0), "no level for this ISVSVN"),
    ):
        book.refuse(name, "v4", "TDX_QE_IDENTITY", why, quote=b64(quote(form)))
    book.refuse(
        "qe-of-an-old-level",
        "v4",
        "TDX_QE_STATUS",
        "an OutOfDate quoting enclave",
        also=("TDX_TCB_STATUS", "TDX_ADVISORY"),
        quote=b64(quote(F(qe_svn=1))),
    )
