"""The measured configuration: understood to the last key, or refused in one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from attestation.errors import InputError
from enclave.settings import Listen, Settings

GOOD = """version = 1
role = "both"
dns-names = ["b.test", "a.test"]
listen = "unix:s/enclave.sock"

[paths]
tsm = "."
measurements = "."
acpi = "."
pci = "."
statements = "."
endorsements = "."
runtime = "run"

[appraisal]
policy = "appraisal.toml"
sha256 = "{a}"

[gpu]
count = 1
switches = 0

[certificate]
lifetime-seconds = 3600

[access]
bootstrap-sha256 = "{a}"

[state]
url = "sqlite:state.db"

[prices]
currency = "USD"
unit = "nano-usd-per-million-tokens"
models = { parrot = { input = 1, cached-input = 1, output = 1 } }

[[models]]
id = "parrot"
path = "model"
weights = "sha256:{a}"
profile = "cpu"
placement = "in-process"
task = "generate"
memory-percent = 10
max-model-len = 2048
""".replace("{a}", "a" * 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "appraisal.toml").touch()
    (tmp_path / "golden.json").touch()
    return tmp_path


def test_good_configuration_is_read_once_and_its_digest_covers_its_bytes(base: Path) -> None:
    (base / "enclave.toml").write_text(GOOD)
    settings = Settings.load(base / "enclave.toml")
    assert settings.digest == hashlib.sha256(GOOD.encode()).digest()
    assert settings.dns_names == ("a.test", "b.test")
    assert settings.listen == Listen("unix", path=base / "s/enclave.sock")
    assert settings.models[0].path == base / "model" and settings.models[0].golden is None
    assert settings.paths.runtime == base / "run"
    assert settings.state.url == f"sqlite:{base / 'state.db'}"
    assert set(settings.prices.models) == {"parrot"}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = 1\nbonus = 1", "bonus: is not a key"),
        ('tsm = "."', 'tsm = "."\nTSM = "."', "paths.TSM: is not a key"),
        ("switches = 0", "", "gpu.switches: is missing"),
        ("switches = 0", "switches = 9", "gpu.switches: is out of bounds"),
        ("count = 1\nswitches = 0", "count = 0\nswitches = 1", "gpu.switches"),
        ("count = 1", "count = true", "gpu.count: has the wrong type"),
        ("count = 1", 'count = "1"', "gpu.count: has the wrong type"),
        ("3600", "3601", "certificate.lifetime-seconds: is out of bounds"),
        ("3600", "59", "certificate.lifetime-seconds: is out of bounds"),
        ('role = "both"', 'role = "all"', "role: is not known"),
        ('"a.test"]', '"A.test"]', "dns-names: not a DNS name"),
        ('"a.test"]', '"*.test"]', "dns-names: not a DNS name"),
        ('"a.test"]', '"b.test"]', "dns-names: a name stands twice"),
        ('["b.test", "a.test"]', "[]", "dns-names: wrong number"),
        ('["b.test", "a.test"]', "[1]", "dns-names: not a DNS name"),
        ("unix:s/enclave.sock", "s/enclave.sock", "listen: is not an address"),
        ("unix:s/enclave.sock", "tcp:127.0.0.1", "listen: is not an address"),
        ("unix:s/enclave.sock", "tcp:127.0.0.1:70000", "listen: is not an address"),
        ("unix:s/enclave.sock", "vsock:0", "listen: is not an address"),
        ("unix:s/enclave.sock", "unix:" + "s" * 108, "listen: the socket's path is too long"),
        ('path = "model"', 'path = "nowhere"', "models[0].path: there is no directory"),
        ('acpi = "."', 'acpi = "nowhere"', "paths.acpi: there is no directory"),
        ('policy = "appraisal.toml"', 'policy = "nowhere"', "appraisal.policy: there is no file"),
        ("sha256:aaa", "sha256:AAA", "models[0].weights: is not well formed"),
        ("sha256:aaa", "aaa", "models[0].weights: is not well formed"),
        ('profile = "cpu"', 'profile = "echo"', "models[0].profile: is not known"),
        ('profile = "cpu"', 'profile = "h100-cc"', "models[0].golden: is missing"),
        ('id = "parrot"', 'id = ""', "models[0].id: is not well formed"),
        ('id = "parrot"', 'id = "parrot"\ntrust-remote-code = true', "models[0].trust-remote-code: is not a key"),
        ("max-model-len = 2048", "max-model-len = 2", "models[0].max-model-len"),
        ('placement = "in-process"\n', "", "models[0].placement: is missing"),
        ('placement = "in-process"', 'placement = "thread"', "models[0].placement: is not known"),
        ('task = "generate"\n', "", "models[0].task: is missing"),
        ('task = "generate"', 'task = "rerank"', "models[0].task: is not known"),
        ("memory-percent = 10\n", "", "models[0].memory-percent: is missing"),
        ("memory-percent = 10", "memory-percent = 96", "models[0].memory-percent: is out of bounds"),
        ('bootstrap-sha256 = "a', 'bootstrap-sha256 = "x', "access.bootstrap-sha256: is not well formed"),
        ("sqlite:state.db", "sqlite:nowhere/state.db", "state.url: there is no directory"),
        ("{ parrot =", "{ other =", "prices.models: are not the models served"),
        ("[access]", "[[access]]", "access: has the wrong type"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(base: Path, old: str, new: str, what: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as refused:
        Settings.parse(GOOD.replace(old, new, 1).encode(), base=base)
    assert refused.value.code == "INPUT_CONFIG_FIELD"
    assert refused.value.reason.startswith(what), refused.value.reason
    assert "\n" not in str(refused.value)


def test_model_twice_is_refused(base: Path) -> None:
    model = GOOD[GOOD.index("[[models]]") :]
    with pytest.raises(InputError, match="a model id stands twice"):
        Settings.parse((GOOD + model).encode(), base=base)


def another(base: Path, **changed: str) -> bytes:
    model = GOOD[GOOD.index("[[models]]") :].replace('id = "parrot"', 'id = "second"')
    for old, new in changed.items():
        assert old.replace("_", "-") in model
        model = model.replace(old.replace("_", "-"), new)
    return (priced() + model).encode()


def priced() -> str:
    """With a price for the second model."""
    return GOOD.replace("{ parrot =", "{ second = { input = 1, cached-input = 1, output = 1 }, parrot =")


def test_one_model_is_mounted_and_others_are_processes(base: Path) -> None:
    with pytest.raises(InputError, match="more than one is in-process"):
        Settings.parse(another(base), base=base)
    raw = another(base).decode().replace('"in-process"', '"process"')
    assert {m.placement for m in Settings.parse(raw.encode(), base=base).models} == {"process"}
    raw = another(base, in_process="process").decode()
    assert [m.placement for m in Settings.parse(raw.encode(), base=base).models] == ["in-process", "process"]


def test_models_that_together_want_too_much_memory_are_refused(base: Path) -> None:
    raw = another(base, in_process="process").decode()
    assert Settings.parse(raw.replace("percent = 10", "percent = 47").encode(), base=base)
    with pytest.raises(InputError, match="together they ask for too much memory"):
        Settings.parse(raw.replace("percent = 10", "percent = 48").encode(), base=base)


@pytest.mark.parametrize("raw", [b"\xff", b"version = 1\nversion = 1", b"[", b"x" * 300_000])
def test_bytes_that_are_no_configuration_are_refused(base: Path, raw: bytes) -> None:
    with pytest.raises(InputError) as refused:
        Settings.parse(raw, base=base)
    assert refused.value.code in ("INPUT_CONFIG_TOML", "INPUT_CONFIG_SIZE")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("sqlite:state.db", "mysql://host/db", "INPUT_STATE_URL"),
        ("sqlite:state.db", "postgresql://u@host/db", "INPUT_STATE_URL"),
        ("input = 1,", "input = -1,", "INPUT_PRICES"),
        ("input = 1,", "input = 0.5,", "INPUT_PRICES"),
        ('"USD"', '"EUR"', "INPUT_PRICES"),
    ],
)
def test_state_and_prices_are_refused_in_their_own_words(base: Path, old: str, new: str, code: str) -> None:
    with pytest.raises(InputError) as refused:
        Settings.parse(GOOD.replace(old, new, 1).encode(), base=base)
    assert refused.value.code == code


def test_missing_file_is_one_line(base: Path) -> None:
    with pytest.raises(InputError, match="cannot read the configuration"):
        Settings.load(base / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "kind"), [("tcp:127.0.0.1:0", "tcp"), ("tcp:[::1]:8443", "tcp"), ("vsock:8443", "vsock")]
)
def test_addresses_are_written_as_they_are_read(base: Path, text: str, kind: str) -> None:
    settings = Settings.parse(GOOD.replace("unix:s/enclave.sock", text).encode(), base=base)
    assert settings.listen.kind == kind and str(settings.listen) == text
