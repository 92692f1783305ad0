"""GPU evidence: JSON, SPDM reports, devices together, mode, count, fabric, allow lists."""

from __future__ import annotations

from tests.conformance.book import Book
from tests.conformance.gpu_machine import (
    DRIVER,
    NODE_STAGES,
    NONCE,
    VBIOS,
    answered,
    certificates,
    entry,
    form,
    honest,
    links,
    manifests,
    node,
    pdi,
    report,
    tee,
    with_chain,
)
from tests.devtee.pki import pem
from tests.genuine import any_reason, policy_text

__all__ = ["report_rows"]

RECORD = 45 + 64 * 55
OPAQUE = RECORD + 32
SPDM = "DMTF DSP0274 1.1 §10.11"
PPCIE = "NVIDIA protected PCIe, HGX H100 8-GPU"
POLICY = "RFC 9334 §8.5, Appraisal Policy for Evidence"


def report_rows(book: Book) -> None:
    """Controls, and all rows about reports and about devices together."""
    book.clause = SPDM
    book.control("one", "one honest H100, every stage required", honest())
    book.control("two", "two honest H100", honest(2))
    book.control("any-mode", "two honest H100, no mode asked for", honest(2, mode=None))
    book.control(
        "mpt", "one honest GPU with NVLink encryption", honest(evidence=[entry(0, form(feature_flag=1))], mode="mpt")
    )
    given = honest(8, **node()) | {"mode": "ppcie", "count": [8, 4], "require": NODE_STAGES, "rims": {}, "ocsp": {}}
    book.control("node", "an honest protected-PCIe node of eight GPUs and four switches", given)
    book.control("policy", "one honest H100 under a policy that lists it", honest(policy=_policy()))
    for name, told, why in (
        ("inactive-measurement", form(measurements={13: b"\2" * 48}), "no RIM names measurement 13"),
        ("measurement-35-decoder-off", form(measurements={35: b"\2" * 48}), "not compared while NVDEC0 is off"),
        ("feature-flag-spt", form(feature_flag=0), "the flag says what the status says"),
        ("opaque-types-of-newer-drivers", form(extra_opaque=((34, b"\1\0"), (99, b"new"))), "unknown types are signed"),
    ):
        book.accept(name, "one", why, evidence=[entry(0, told)])
    _json(book)
    _framing(book)
    _devices(book)
    _mode(book)
    _fabric(book)
    _lists(book)


def _json(book: Book) -> None:
    book.clause = "NVIDIA attestation SDK: evidence JSON"
    shape, cert = "FORMAT_GPU_JSON", "FORMAT_GPU_PEM"
    chain = pem(certificates()).rstrip(b"\n")
    huge = "A" * (1 << 16)
    values: tuple[tuple[str, list[object], str], ...] = (
        ("entry-a-text", ["text"], "not an object"),
        ("entry-without-certificate", [{k: v for k, v in entry().items() if k != "certificate"}], "no chain"),
        ("entry-without-evidence", [{k: v for k, v in entry().items() if k != "evidence"}], "no report"),
        ("evidence-a-list", [entry(evidence=[1])], "not text"),
        ("evidence-with-a-blank", [entry(evidence="AA AA")], "a second spelling of base64"),
        ("evidence-url-safe", [entry(evidence="____")], "another alphabet"),
        ("evidence-without-padding", [entry(evidence="AAA")], "a second spelling of base64"),
        ("evidence-of-48-kib", [entry(evidence=huge)], "sizes are capped before decoding"),
        ("certificate-of-48-kib", [entry(certificate=huge)], "sizes are capped before decoding"),
        ("arch-a-number", [entry(arch=9)], "not text"),
        ("nonce-of-65-characters", [entry(nonce="0" * 65)], "sizes are capped"),
    )
    for name, value, why in values:
        book.refuse(f"json-{name}", "one", shape, why, evidence=value)
    for name, text, why in (
        ("no-pem", b"hello", "no certificate"),
        ("text-before", b"text\n" + chain, "bytes that nobody accounts for"),
        ("text-after", chain + b"\ntext", "bytes that nobody accounts for"),
        ("cr-lf", chain.replace(b"\n", b"\r\n"), "a second spelling"),
        (
            "damaged",
            chain.replace(b"-----BEGIN CERTIFICATE-----\nMI", b"-----BEGIN CERTIFICATE-----\nXX", 1),
            "no certificate inside",
        ),
        ("twice", chain + b"\n" + chain, "numbers are capped"),
    ):
        book.refuse(f"pem-{name}", "one", cert, why, evidence=with_chain(text))
    book.refuse("no-device", "one", "FORMAT_GPU_COUNT", "evidence of nothing proves everything", evidence=[])
    book.refuse("seventeen-gpus", "one", "FORMAT_GPU_COUNT", "numbers are capped", evidence=[entry()] * 17)
    book.refuse("nine-switches", "node", "FORMAT_GPU_COUNT", "numbers are capped", switches=[node()["switches"][0]] * 9)


def _framing(book: Book) -> None:
    r = report()

    def put(at: int, new: bytes) -> bytes:
        return r[:at] + new + r[at + len(new) :]

    unread = ("GPU_NO_REPORT", "GPU_TOPOLOGY")  # what later stages say when there is no report
    size, head, block, length, opaque = (f"FORMAT_GPU_{n}" for n in ("SIZE", "HEADER", "BLOCK", "LENGTH", "OPAQUE"))
    request, response, data = f"{SPDM}: GET_MEASUREMENTS", f"{SPDM}: MEASUREMENTS", f"{SPDM}: OpaqueData"
    blocks = f"{SPDM}: measurement block"
    for clause, name, raw, code, why in (
        (request, "empty", b"", size, "there is no report"),
        (request, "spdm-1.2", put(0, b"\x12"), head, "a version that signs with a prefix"),
        (request, "other-request-code", put(1, b"\xe1"), head, "not GET_MEASUREMENTS"),
        (request, "no-signature-asked-for", put(2, b"\0"), head, "an answer to it is not signed"),
        (request, "one-measurement-asked-for", put(3, b"\1"), head, "the others would go unread"),
        (request, "slot-1", put(36, b"\1"), head, "another certificate chain"),
        (response, "other-response-code", put(38, b"\x7f"), head, "an SPDM error is no measurement"),
        (response, "response-version", put(37, b"\x10"), head, "request and response disagree"),
        (response, "63-blocks", put(41, b"\x3f"), block, "a device nobody knows"),
        (response, "31-blocks-in-a-gpu-record", put(41, b"\x1f"), length, "a GPU read as a switch"),
        (response, "record-too-short", put(42, b"\xbf"), length, "two lengths that disagree"),
        (response, "record-of-16-mib", put(42, b"\xff\xff\xff"), length, "an allocation of the peer's choice"),
        (blocks, "index-twice", put(45 + 55, b"\1"), block, "which of two counts would be up to the reader"),
        (blocks, "index-0", put(45, b"\0"), block, "indices run from 1"),
        (blocks, "raw-measurement", put(45 + 4, b"\x81"), block, "a raw bit stream instead of a digest"),
        (blocks, "block-size", put(45 + 2, b"\x34"), block, "two lengths that disagree"),
        (blocks, "value-size", put(45 + 5, b"\x2f"), block, "two lengths that disagree"),
        (blocks, "measurement-specification", put(45 + 1, b"\2"), block, "not DMTF's"),
        (data, "opaque-too-short", put(OPAQUE, b"\0\0"), length, "bytes that nobody accounts for"),
        (data, "opaque-too-long", put(OPAQUE, b"\xff\xff"), length, "a length beyond the end"),
        (data, "opaque-value-beyond-the-list", put(OPAQUE + 4, b"\xff\xff"), opaque, "a length beyond the end"),
        (data, "opaque-type-twice", put(OPAQUE + 2, b"\x0e"), opaque, "which of two counts would be up to the reader"),
        (response, "trailing-byte", r + b"\0", length, "bytes that nobody accounts for"),
        (response, "last-byte-missing", r[:-1], length, "the signature ends early"),
    ):
        book.clause = clause
        book.refuse(f"report-{name}", "one", code, why, also=unread, evidence=[entry(0, raw)])
    book.clause = f"{data}: NVIDIA's types"
    for name, told, why in (
        ("nvdec-neither-on-nor-off", form(nvdec0=0), "0 is no status: NVIDIA's verifier reads it as off"),
        ("protected-pcie-neither-on-nor-off", form(protected_pcie=0), "0 is no status"),
        ("driver-that-names-a-path", form(driver="550.90.07/../../etc"), "versions become file names"),
        ("driver-empty", form(driver=""), "no version"),
        ("driver-of-64-characters", form(driver="5" * 64), "sizes are capped"),
        ("project-with-a-blank", form(project="10 10"), "letters, digits, dots and dashes alone"),
        ("fwid-of-47-bytes", form(fwid=bytes(47)), "SHA-384 has 48"),
        ("fwid-twice", form(extra_opaque=((20, bytes(48)),)), "which of two counts would be up to the reader"),
        ("links-of-143-bytes", form(extra_opaque=((22, bytes(143)),)), "18 ids of 8 bytes"),
        ("flag-of-one-byte", form(extra_opaque=((36, b"\2"),)), "two bytes"),
        ("chip-not-ascii", form(extra_opaque=((35, b"GB\xff\x00"),)), "letters, digits, dots and dashes alone"),
    ):
        book.refuse(
            f"opaque-{name}",
            "one",
            opaque,
            f"signed, and still: {why}",
            also=unread,
            evidence=[entry(0, told)],
        )
    book.clause = f"{SPDM}: signature over request and response"
    mismatch = ("GPU_RIM_MISMATCH",)
    for name, at, also, why in (
        ("nonce-edited", 4, ("GPU_NONCE",), "a nonce written into an old report"),
        ("measurement-edited", 45 + 7, mismatch, "an active measurement edited"),
        ("inactive-measurement-edited", 45 + 55 * 50 + 7, (), "a measurement that no RIM names"),
        ("response-nonce-edited", RECORD, (), "the device's own nonce"),
        ("signature-r-edited", len(r) - 96, (), "a signature that does not hold"),
        ("signature-s-edited", len(r) - 1, (), "a signature that does not hold"),
    ):
        book.refuse(
            f"report-{name}", "one", "GPU_SIGNATURE", why, also=also, evidence=[entry(0, put(at, bytes([r[at] ^ 1])))]
        )
    book.refuse(
        "report-signature-of-zeros",
        "one",
        "GPU_SIGNATURE",
        "r = s = 0 (CVE-2022-21449)",
        evidence=[entry(0, r[:-96] + bytes(96))],
    )
    book.refuse(
        "report-signed-by-another-gpu",
        "one",
        "GPU_SIGNATURE",
        "another device's key",
        evidence=[entry(0, form(signer=1))],
    )
    book.refuse(
        "chain-of-another-gpu",
        "one",
        "GPU_SIGNATURE",
        "a genuine chain, not of this device",
        also=("GPU_OCSP_MISSING",),
        evidence=[entry(1, report(0))],
    )


def _devices(book: Book) -> None:
    book.clause = "RA-TLS profile §3.4, the verifier's own nonce"
    book.refuse(
        "nonce-of-another-challenge", "one", "GPU_NONCE", "a replay, or fetched from an honest node", nonce="00" * 32
    )
    book.refuse("nonce-last-byte", "one", "GPU_NONCE", "compared to the last byte", nonce=NONCE.hex()[:-2] + "00")
    stolen = tee().gpu_evidence(bytes(range(32)), [1], form())[0]
    book.refuse(
        "second-gpu-of-another-machine",
        "two",
        "GPU_NONCE",
        "a genuine GPU that answers somebody else",
        evidence=[entry(0), stolen],
    )
    book.clause = "RA-TLS profile §3.2, distinct devices"
    book.refuse("one-gpu-listed-twice", "two", "GPU_DUPLICATE", "one GPU shown as two", evidence=[entry(0), entry(0)])
    book.refuse(
        "one-gpu-with-two-reports",
        "two",
        "GPU_DUPLICATE",
        "two reports of one GPU",
        evidence=[entry(0), entry(0, form(response_nonce=bytes(32)))],
    )
    flipped = report(1)[: 45 + 7] + bytes([report(1)[45 + 7] ^ 1]) + report(1)[45 + 8 :]
    for name, order in (
        ("good-and-tampered", [entry(0), entry(1, flipped)]),
        ("tampered-and-good", [entry(1, flipped), entry(0)]),
    ):
        book.refuse(
            name,
            "two",
            "GPU_SIGNATURE",
            "one good device does not answer for another",
            also=("GPU_RIM_MISMATCH",),
            evidence=order,
        )
    book.clause = f"{POLICY}: count"
    book.refuse("one-gpu-too-few", "two", "GPU_COUNT", "attest one, use another", evidence=[entry(0)])
    book.refuse(
        "one-gpu-too-many",
        "two",
        "GPU_COUNT",
        "a device that nobody asked for",
        evidence=[entry(0), entry(1), entry(2)],
        ocsp=answered(gpus=3),
    )
    book.refuse("switches-expected", "one", "GPU_COUNT", "switches that are not shown", count=[1, 4])
    book.clause = f"{SPDM}: measurement block"
    book.refuse(
        "gpu-called-a-switch",
        "two",
        "FORMAT_GPU_KIND",
        "a GPU in a switch's place",
        also=("GPU_COUNT", "GPU_NO_REPORT"),
        evidence=[entry(0)],
        switches=[entry(1)],
    )
    switch = node()["switches"][0]
    missing = ("GPU_COUNT", "GPU_OCSP_MISSING", "GPU_RIM_MISSING", "GPU_TOPOLOGY")
    book.refuse("switch-alone", "one", "GPU_ABSENT", "no GPU at all", also=missing, evidence=[], switches=[switch])
    book.refuse(
        "switch-called-a-gpu",
        "two",
        "FORMAT_GPU_KIND",
        "a switch in a GPU's place",
        also=("GPU_NO_REPORT", "GPU_OCSP_MISSING", "GPU_TOPOLOGY"),
        evidence=[entry(0), switch],
    )


def _mode(book: Book) -> None:
    book.clause = f"{PPCIE}: feature flag and protected-PCIe status"
    fabric = ("GPU_TOPOLOGY",)
    for name, told, also, why in (
        ("protected-pcie-instead-of-spt", form(protected_pcie=0xAA), fabric, "plaintext NVLink to others"),
        ("mpt-instead-of-spt", form(feature_flag=1), (), "another mode than asked for"),
        ("flag-ppcie-status-off", form(feature_flag=2), fabric, "flag and status name two modes"),
        ("flag-spt-status-on", form(feature_flag=0, protected_pcie=0xAA), fabric, "flag and status name two modes"),
        ("flag-mpt-status-on", form(feature_flag=1, protected_pcie=0xAA), fabric, "flag and status name two modes"),
        ("flag-nobody-knows", form(feature_flag=3), fabric, "a mode nobody knows"),
    ):
        book.refuse(f"mode-{name}", "one", "GPU_MODE", why, also=also, evidence=[entry(0, told)])
    book.refuse("mode-spt-instead-of-ppcie", "one", "GPU_MODE", "another mode than asked for", mode="ppcie")
    book.refuse("mode-spt-instead-of-mpt", "mpt", "GPU_MODE", "NVLink without encryption", evidence=[entry(0)])
    mixed = [entry(0), entry(1, form(feature_flag=1))]
    book.refuse("mode-two-gpus-two-modes", "two", "GPU_MODE", "all GPUs say one mode", also=fabric, evidence=mixed)
    book.refuse(
        "mode-two-modes-none-asked-for", "any-mode", "GPU_MODE", "all GPUs say one mode", also=fabric, evidence=mixed
    )


def _fabric(book: Book) -> None:
    book.clause = f"{PPCIE}: topology"
    code, count = "GPU_TOPOLOGY", ("GPU_COUNT",)
    seven = range(7)
    everyone = [pdi("gpu", n) for n in range(8)]
    crowded = b"".join([pdi("switch", n) for n in (1, 2, 3)] + [pdi("switch", 0)] * 15)
    lost = {n: links().replace(pdi("switch", 0), bytes(8)) for n in range(8)}
    for name, shown, also, why in (
        ("seven-gpus", node(seven), count, "attest seven, use eight"),
        ("three-switches", node(switches=range(3)), count, "a switch that nobody attested carries plaintext"),
        ("no-switches", node(switches=()), count, "nobody attested the fabric"),
        ("one-switch-twice", node(switches=(0, 1, 2, 2)), ("GPU_DUPLICATE",), "one switch shown as two"),
        ("one-gpu-twice", node((0, 1, 2, 3, 4, 5, 6, 6)), ("GPU_DUPLICATE",), "one GPU shown as two"),
        ("switch-of-another-chassis", node(own={3: pdi("other", 3)[::-1]}), (), "no GPU is linked to it"),
        ("switch-in-the-other-byte-order", node(own={0: pdi("switch", 0)}), (), "the id as GPUs give it"),
        ("switch-with-the-id-of-zeros", node(own={0: bytes(8)}, linked=lost), (), "an id that is none"),
        ("two-switches-of-one-id", node(own={1: pdi("switch", 0)[::-1]}), (), "four switches, three ids"),
        ("gpu-without-links", node(linked={5: b""}), (), "a GPU outside of the fabric"),
        (
            "gpu-of-another-chassis",
            node(linked={5: links().replace(b"switch", b"others")}),
            (),
            "linked to switches that nobody attested",
        ),
        (
            "gpu-with-a-fifth-switch",
            node(linked={0: links()[:-8] + pdi("other", 0)}),
            (),
            "one link to a switch that nobody attested",
        ),
        ("gpu-not-linked-to-one-switch", node(linked={0: links((0, 1, 2, 2))}), (), "three switches at 18 links"),
        ("gpu-linked-to-one-switch-mostly", node(linked={0: crowded}), (), "four or five links to each"),
        (
            "switch-sees-another-gpu",
            node(sees={2: b"".join([*everyone[:7], pdi("other", 9)])}),
            (),
            "the four must see the same eight",
        ),
        ("switch-sees-a-gpu-twice", node(sees={2: b"".join([*everyone[:7], everyone[0]])}), (), "eight, not seven"),
        ("switch-sees-no-gpu", node(sees={2: bytes(64)}), (), "eight, not none"),
        (
            "all-switches-see-zeros-for-a-gpu",
            node(sees=dict.fromkeys(range(4), b"".join([*everyone[:7], bytes(8)]))),
            (),
            "an id that is none",
        ),
        (
            "all-switches-see-ones-for-a-gpu",
            node(sees=dict.fromkeys(range(4), b"".join([*everyone[:7], b"\xff" * 8]))),
            (),
            "an id that is none",
        ),
    ):
        if name in ("one-gpu-twice",):
            book.refuse(f"node-{name}", "node", "GPU_DUPLICATE", why, **shown)
        else:
            book.refuse(f"node-{name}", "node", code, why, also=also, **shown)
    linked = form(extra_opaque=((22, links()),))
    book.refuse("links-in-mode-spt", "one", code, "a GPU on its own shows no fabric", evidence=[entry(0, linked)])
    book.refuse(
        "switches-in-mode-spt",
        "one",
        code,
        "a GPU on its own shows no switches",
        also=("GPU_COUNT", "GPU_OCSP_MISSING", "GPU_RIM_MISSING"),
        switches=node(switches=(0,))["switches"],
    )


def _policy(**changes: object) -> str:
    absent = any_reason("this table has no release and no operator")
    lists = {"gpu.drivers": ["550.90.07"], "gpu.vbios": ["96.00.9F.00.01"], "gpu.hwmodels": ["SIM GH100 A01 GSP BROM"]}
    return policy_text(tee(), {"release": absent, "deployment": absent} | lists | changes)


def _lists(book: Book) -> None:
    book.clause = f"{POLICY}: allow lists"
    for name, listed, code, why in (
        ("drivers", ["570.10"], "GPU_DRIVER", "an old driver passes everything else"),
        ("vbios", ["96.00.9F.00.02"], "GPU_VBIOS", "an old VBIOS passes everything else"),
        ("hwmodels", ["GH100 A01 GSP BROM"], "GPU_HWMODEL", "another chip"),
    ):
        book.refuse(f"policy-allows-other-{name}", "policy", code, why, policy=_policy(**{f"gpu.{name}": listed}))
    book.refuse(
        "policy-prefix-of-a-driver",
        "policy",
        "GPU_DRIVER",
        "versions are compared whole",
        policy=_policy(**{"gpu.drivers": ["550.90"]}),
    )
    book.clause = f"{POLICY}: a required stage without input is a failure"
    book.refuse("no-rims", "one", "GPU_RIM_MISSING", "nothing to compare with", rims={})
    book.refuse("no-driver-rim", "one", "GPU_RIM_MISSING", "half of it is nothing", rims={VBIOS: manifests()[VBIOS]})
    book.refuse("no-vbios-rim", "one", "GPU_RIM_MISSING", "half of it is nothing", rims={DRIVER: manifests()[DRIVER]})
    book.refuse("no-ocsp", "one", "GPU_OCSP_MISSING", "no answer is no good news", ocsp={})
    for role in answered():
        if role != "device-ik":
            book.refuse(
                f"no-ocsp-for-{role}",
                "one",
                "GPU_OCSP_MISSING",
                "each certificate needs its answer",
                ocsp={k: v for k, v in answered().items() if k != role},
            )
    book.refuse(
        "broken-report-when-little-is-required",
        "one",
        "FORMAT_GPU_SIZE",
        "what does not parse cannot be accepted for another reason",
        evidence=[entry(0, b"no report")],
        require=["distinct"],
    )
