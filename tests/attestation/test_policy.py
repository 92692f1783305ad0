"""Policies: what is permissive by mistake is refused when the policy is read, with the field's name."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from attestation.dsse import public_bytes
from attestation.errors import PolicyError
from attestation.policy import BUILT_IN_ROOTS, GPU_STAGES, GpuPolicy, Policy, Roots, Skip, platform_policy, with_roots
from tests.devtee.tee import DevTee
from tests.genuine import Drop, any_reason, machine, operator_key, policy_text, signer_key

TEE = DevTee(machine())
PRODUCTION = {
    "development": False, "roots.intel": "built-in", "roots.nvidia-device": "built-in", "roots.nvidia-rim": "built-in",
}  # fmt: skip


def read(**changes: Any) -> Policy:
    return Policy.parse(policy_text(TEE, {k.replace("__", "."): v for k, v in changes.items()}))


def refuse(text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text)
    assert caught.value.code.startswith("POLICY_")
    return caught.value


def wrong(field: str, value: Any, **more: Any) -> PolicyError:
    return refuse(policy_text(TEE, {field: value, **more}))


def test_a_policy_is_read_whole() -> None:
    policy = read()
    assert policy.development
    assert policy.roots == Roots(TEE.roots.intel, TEE.roots.nvidia_device, TEE.roots.nvidia_rim)
    assert isinstance(policy.gpu, GpuPolicy)
    assert (policy.gpu.count, policy.gpu.mode, policy.gpu.require) == (1, "spt", frozenset(GPU_STAGES))
    assert policy.tdx.tcb_status == {"UpToDate"}
    assert policy.tdx.max_collateral_age == 30 * 86400
    assert not isinstance(policy.release, Skip)
    assert policy.release.signers == {public_bytes(signer_key(n)) for n in range(3)}
    assert not isinstance(policy.deployment, Skip)
    assert policy.deployment.operators == {public_bytes(operator_key(n)) for n in range(3)}
    assert policy.channel.proof == "exporter"


def test_a_production_policy_is_read_whole() -> None:
    policy = Policy.parse(policy_text(TEE, PRODUCTION))
    assert not policy.development
    assert policy.roots == BUILT_IN_ROOTS


def test_the_digest_covers_every_byte_of_the_text() -> None:
    text = policy_text(TEE)
    assert Policy.parse(text).digest != Policy.parse(text + "\n").digest
    assert Policy.parse(text) == Policy.parse(text)


FIELDS = [
    "version", "name", "development", "roots", "roots.intel", "roots.nvidia-device", "roots.nvidia-rim", "tdx",
    *(f"tdx.{k}" for k in ("tcb-status", "advisories", "min-tcb-evaluation", "max-collateral-age-days",
                           "td-attributes", "xfam", "mrseam", "mrconfigid", "mrowner", "mrownerconfig", "platforms")),
    "gpu", *(f"gpu.{k}" for k in ("count", "switches", "mode", "drivers", "vbios", "hwmodels", "require")),
    "release", "release.signers", "release.threshold", "deployment",
    *(f"deployment.{k}" for k in ("operators", "threshold", "min-serial", "role", "status-list", "status-url")),
    "channel", "channel.proof", "channel.fresh-gpu",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_required(field: str) -> None:
    error = wrong(field, Drop)
    assert error.code == "POLICY_MISSING"
    assert field in error.reason
    assert error.hint


@pytest.mark.parametrize("table", ["", "roots.", "tdx.", "gpu.", "release.", "deployment.", "channel."])
def test_an_unknown_key_is_refused_wherever_it_stands(table: str) -> None:
    assert wrong(f"{table}tcb-statuses", ["UpToDate"]).code == "POLICY_UNKNOWN_KEY"


def test_a_key_that_stands_twice_is_refused() -> None:
    text = policy_text(TEE)
    assert refuse(text + "fresh-gpu = false\n").code == "POLICY_TOML"
    assert refuse(text + "[tdx]\n").code == "POLICY_TOML"


@pytest.mark.parametrize(
    "field",
    ["tdx.tcb-status", "tdx.td-attributes", "tdx.xfam", "tdx.mrseam", "tdx.platforms", "gpu.drivers", "gpu.vbios",
     "gpu.hwmodels", "gpu.require", "release.signers", "deployment.operators"],
)  # fmt: skip
def test_an_empty_list_would_allow_nothing_or_everything_and_is_refused(field: str) -> None:
    assert wrong(field, []).code == "POLICY_EMPTY"


def test_no_advisory_is_an_empty_list() -> None:
    assert read().tdx.advisories == frozenset()


HEX48, HEX32, HEX16 = "0a" * 48, "0a" * 32, "0a" * 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2), ("version", True), ("version", "1"), ("name", ""), ("name", "*"), ("development", 1),
        ("development", "true"), ("tdx.tcb-status", "UpToDate"), ("tdx.tcb-status", ["uptodate"]),
        ("tdx.tcb-status", ["Revoked"]), ("tdx.tcb-status", ["OutOfDateConfigurationNeeded"]),
        ("tdx.tcb-status", ["*"]), ("tdx.tcb-status", ["UpToDate", "UpToDate"]), ("tdx.tcb-status", ["UpToDate", 1]),
        ("tdx.advisories", ["*"]), ("tdx.advisories", ["INTEL-SA-*"]), ("tdx.advisories", ["SA-00837"]),
        ("tdx.advisories", ["INTEL-SA-00837\n"]), ("tdx.min-tcb-evaluation", 0), ("tdx.min-tcb-evaluation", True),
        ("tdx.min-tcb-evaluation", "19"), ("tdx.min-tcb-evaluation", -1), ("tdx.min-tcb-evaluation", 1.5),
        ("tdx.max-collateral-age-days", 0), ("tdx.max-collateral-age-days", True), ("tdx.td-attributes", [0x10000000]),
        ("tdx.td-attributes", ["10000000"]), ("tdx.td-attributes", ["0x1000_0000"]), ("tdx.td-attributes", ["*"]),
        ("tdx.xfam", ["0X600E7"]), ("tdx.xfam", "0x600e7"), ("tdx.xfam", ["0x" + "f" * 17]), ("tdx.mrseam", HEX48),
        ("tdx.mrseam", [HEX48[:-2]]), ("tdx.mrseam", [HEX48.upper()]), ("tdx.mrseam", ["zero"]),
        ("tdx.mrconfigid", ""), ("tdx.mrconfigid", "any"), ("tdx.mrconfigid", HEX48[:-1]), ("tdx.mrowner", 0),
        ("tdx.mrownerconfig", [HEX48]), ("tdx.platforms", ["*"]), ("tdx.platforms", [HEX16 + "0a"]), ("gpu", []),
        ("gpu", "any"), ("gpu.count", 0), ("gpu.count", True), ("gpu.count", "1"), ("gpu.count", -1),
        ("gpu.switches", -1), ("gpu.switches", False), ("gpu.mode", "off"), ("gpu.mode", "SPT"), ("gpu.mode", ""),
        ("gpu.drivers", ["*"]), ("gpu.drivers", ["550.*"]), ("gpu.drivers", ["550.90.07", "550.90.07"]),
        ("gpu.drivers", [""]), ("gpu.drivers", "550.90.07"), ("gpu.vbios", [96]), ("gpu.require", ["everything"]),
        ("gpu.require", ["all", "nonce"]), ("gpu.require", "all"), ("release", True), ("release.threshold", 0),
        ("release.threshold", -1), ("release.threshold", 4), ("release.threshold", True), ("release.threshold", "1"),
        ("release.signers", [HEX32[:-2]]), ("release.signers", ["*"]), ("release.signers", HEX32),
        ("release.signers", [HEX32, HEX32]), ("deployment.threshold", 0), ("deployment.threshold", 4),
        ("deployment.threshold", True), ("deployment.min-serial", -1), ("deployment.min-serial", False),
        ("deployment.role", "any"), ("deployment.role", ["both"]), ("deployment.role", "*"),
        ("deployment.status-list", "optional"), ("deployment.status-list", False), ("channel.proof", "none"),
        ("deployment.status-url", ""), ("deployment.status-url", "http://status.test/list"),
        ("deployment.status-url", "https://status.test"), ("deployment.status-url", "https://user@status.test/list"),
        ("deployment.status-url", "https://u:p@status.test/list"), ("deployment.status-url", "https://status.test/l#x"),
        ("deployment.status-url", "https://Status.test/list"), ("deployment.status-url", "https://*.test/list"),
        ("deployment.status-url", "https://status.test:65536/list"), ("deployment.status-url", "https://status.test:0/"),
        ("deployment.status-url", "https://status.test/a b"), ("deployment.status-url", "https://s.test/a\r\nX: y"),
        ("deployment.status-url", "https://status.test/" + "a" * 2000), ("deployment.status-url", ["https://s.test/"]),
        ("deployment.status-url", "file:///list"), ("deployment.status-url", "https:///list"),
        ("channel.proof", False), ("channel.proof", ""), ("channel.fresh-gpu", 0), ("channel.fresh-gpu", "false"),
    ],
)  # fmt: skip
def test_a_permissive_or_malformed_value_is_refused(field: str, value: Any) -> None:
    error = wrong(field, value)
    assert error.code == "POLICY_VALUE"
    assert field in error.reason


@pytest.mark.parametrize(
    "value",
    [
        {"any": ""}, {"any": "short"}, {"any": "        "}, {"any": True}, {"any": ["a reason that is a list"]},
        {"any": "a good reason", "note": 1}, {"any": "a reason\\nof two lines"}, {"because": "a good reason"}, {},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "field",
    [
        "tdx.mrseam", "gpu", "gpu.count", "deployment", "deployment.status-list", "deployment.status-url",
        "channel.proof",
    ],
)  # fmt: skip
def test_a_check_is_left_out_only_with_a_reason(field: str, value: Any) -> None:
    text = policy_text(TEE, {field: "HERE"}).replace('"HERE"', _inline(value))
    refuse(text)


def _inline(value: dict[str, Any]) -> str:
    def one(v: Any) -> str:
        if isinstance(v, bool):
            return str(v).lower()
        return str(v).replace("'", '"') if isinstance(v, list | int) else f'"{v}"'

    return "{ " + ", ".join(f"{k} = {one(v)}" for k, v in value.items()) + " }"


@pytest.mark.parametrize(
    "field",
    [
        "tdx.tcb-status", "tdx.mrseam", "gpu", "gpu.drivers", "release", "deployment", "deployment.status-list",
        "deployment.status-url", "channel.proof",
    ],
)  # fmt: skip
def test_a_reason_is_kept_and_printed(field: str) -> None:
    policy = Policy.parse(policy_text(TEE, {field: any_reason("this test says so")}))
    *parents, last = field.replace("-", "_").split(".")
    value: Any = policy
    for part in [*parents, last]:
        value = getattr(value, part)
    assert value == Skip("this test says so")


@pytest.mark.parametrize(
    "field",
    [
        "release.signers", "release.threshold", "deployment.operators", "deployment.min-serial", "deployment.role",
        "gpu.require", "channel.fresh-gpu",
    ],
)  # fmt: skip
def test_what_makes_a_check_work_at_all_cannot_be_left_out(field: str) -> None:
    assert wrong(field, any_reason()).code == "POLICY_VALUE"


@pytest.mark.parametrize("root", ["intel", "nvidia-device", "nvidia-rim"])
def test_a_root_of_ones_own_needs_the_word_development(root: str) -> None:
    pem = TEE.roots_pem[root.replace("-", "_")].decode()
    assert (
        wrong(f"roots.{root}", pem, **{k: v for k, v in PRODUCTION.items() if k != f"roots.{root}"}).code
        == "POLICY_ROOT"
    )


@pytest.mark.parametrize(
    "value",
    [
        "", "built-in ", "Intel", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----",
        TEE.roots_pem["intel"].decode() * 2, "x" + TEE.roots_pem["intel"].decode(),
        base64.b64encode(TEE.roots.intel).decode(),
    ],
)  # fmt: skip
def test_a_root_is_one_certificate(value: str) -> None:
    assert wrong("roots.intel", value).code == "POLICY_VALUE"


@pytest.mark.parametrize("section", ["release", "deployment"])
def test_a_production_policy_pins_releases_and_the_operator(section: str) -> None:
    assert wrong(section, any_reason(), **PRODUCTION).code == "POLICY_VALUE"
    assert isinstance(getattr(Policy.parse(policy_text(TEE, {section: any_reason()})), section), Skip)


def test_a_production_policy_asks_every_gpu_stage() -> None:
    fewer = [s for s in GPU_STAGES if s != "nonce"]
    assert wrong("gpu.require", fewer, **PRODUCTION).code == "POLICY_VALUE"
    assert Policy.parse(policy_text(TEE, {"gpu.require": list(GPU_STAGES), **PRODUCTION})).gpu
    partial = Policy.parse(policy_text(TEE, {"gpu.require": fewer})).gpu
    assert isinstance(partial, GpuPolicy)
    assert "nonce" not in partial.require


@pytest.mark.parametrize("changes", [{"gpu": any_reason()}, {"channel.proof": any_reason()}])
def test_a_wish_that_nobody_would_ask_is_refused(changes: dict[str, Any]) -> None:
    """Fresh GPU evidence comes with a channel proof, of a GPU: without either, the field reads like a check."""
    assert wrong("channel.fresh-gpu", True, **changes).code == "POLICY_VALUE"


@pytest.mark.parametrize(
    "url", ["https://status.test/", "https://status.test:8443/v1/list.json?of=a-b", "https://127.0.0.1:65535/list"]
)
def test_a_status_url_is_kept_as_it_stands(url: str) -> None:
    policy = read(**{"deployment.status-url": url})
    assert not isinstance(policy.deployment, Skip)
    assert policy.deployment.status_url == url


def test_a_status_url_without_a_list_that_is_asked_for_is_refused() -> None:
    error = wrong("deployment.status-url", "https://status.test/list", **{"deployment.status-list": any_reason()})
    assert error.code == "POLICY_VALUE" and "status-url" in error.reason


@pytest.mark.parametrize(
    "key", [bytes(32), bytes([1]) + bytes(31), bytes(31) + b"\x80", b"\xec" + b"\xff" * 30 + b"\x7f"]
)
@pytest.mark.parametrize("field", ["release.signers", "deployment.operators"])
def test_a_key_under_which_anybody_can_sign_is_refused(field: str, key: bytes) -> None:
    """A placeholder of zeros is such a key."""
    honest = public_bytes(signer_key())
    assert wrong(field, [honest.hex(), key.hex()], **{field.split(".")[0] + ".threshold": 1}).code == "POLICY_WEAK_KEY"


@pytest.mark.parametrize("text", ["", "version = 1", "= 1", "\x00", "[tdx", "a = 1\n" * 60_000])
def test_what_is_no_policy_is_refused(text: str) -> None:
    refuse(text)


def test_the_built_in_policy_appraises_the_platform_and_says_what_it_leaves_out() -> None:
    policy = platform_policy()
    assert not policy.development
    assert policy.roots == BUILT_IN_ROOTS
    assert policy.tdx.tcb_status == {"UpToDate"}
    assert policy.tdx.advisories == frozenset()
    assert policy.tdx.td_attributes == {0x10000000}
    for left_out in (policy.tdx.mrseam, policy.tdx.mrconfigid, policy.release, policy.deployment, policy.channel.proof):
        assert isinstance(left_out, Skip)
        assert len(left_out.why) > 8
    others = [
        platform_policy(min_tcb_evaluation=21), platform_policy(gpu_count=8), platform_policy(gpu_mode="ppcie"),
        platform_policy(gpu_require=frozenset({"nonce"})),
        platform_policy(roots=Roots(TEE.roots.intel, TEE.roots.nvidia_device, TEE.roots.nvidia_rim)),
        platform_policy(roots=Roots(TEE.roots.intel, TEE.roots.intel, TEE.roots.nvidia_rim)),
    ]  # fmt: skip
    assert len({p.digest for p in [policy, *others]}) == 1 + len(others)


def test_another_root_marks_every_policy_as_development() -> None:
    own = Roots(TEE.roots.intel, BUILT_IN_ROOTS.nvidia_device, BUILT_IN_ROOTS.nvidia_rim)
    assert with_roots(platform_policy(), own).development
    assert platform_policy(roots=own).development
    assert with_roots(platform_policy(), BUILT_IN_ROOTS) == platform_policy()
    assert with_roots(read(), BUILT_IN_ROOTS).development
    assert with_roots(read(), own).digest != read().digest
