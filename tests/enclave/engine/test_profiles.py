"""What vLLM would be started with, checked as data: profiles, environment, policy lock."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pytest

from enclave import engine
from enclave.engine import policy
from enclave.engine.base import EngineError, Task
from enclave.engine.profiles import LOCK, LOCK_EMBED, PATHS, PROFILES, argv, environment

RUNTIME = Path("/run/vouchsafe/run")
NEVER = (
    "--trust-remote-code",
    "--enable-log-requests",
    "--enable-log-outputs",
    "--kv-transfer-config",
    "--kv-events-config",
    "--kv-offloading-size",
    "--cpu-offload-gb",
    "--otlp-traces-endpoint",
    "--tool-server",
    "--middleware",
    "--profiler-config",
    "--enable-lora",
    "--enable-sleep-mode",
    "--host",
    "--port",
    "--uds",
)


@dataclass(frozen=True)
class Model:
    profile: str = "cpu"
    id: str = "parrot"
    path: Path = Path("/models/parrot")
    weights: str = ""
    placement: Literal["in-process", "process"] = "in-process"
    task: Task = "generate"
    memory_percent: int = 45
    max_model_len: int = 2048


@pytest.mark.parametrize("name", ["cpu", "h100-cc"])
def test_profile_is_silent_and_passes_nothing_dangerous(name: str) -> None:
    profile = PROFILES[name]
    line = argv(profile, Model())
    assert not set(line) & set(NEVER)
    assert line[:6] == ["--model", "/models/parrot", "--served-model-name", "parrot", "--max-model-len", "2048"]
    assert line[6:8] == ["--gpu-memory-utilization", "0.45"]
    assert "--runner" not in line and "--no-enable-prefix-caching" not in line
    for flag in ("--disable-fastapi-docs", "--disable-uvicorn-access-log", "--disable-log-stats"):
        assert flag in line
    assert line[line.index("--load-format") + 1] == "safetensors"
    env = environment(profile, RUNTIME)
    assert {
        k: env[k] for k in ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    } == dict.fromkeys(("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK", "HF_HUB_OFFLINE"), "1")
    assert (env["VLLM_PLUGINS"], env["OTEL_SDK_DISABLED"]) == ("", "true")
    assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    for name in ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_RPC_BASE_PATH", "VLLM_LOGGING_CONFIG_PATH"):
        assert Path(env[name]).is_relative_to(RUNTIME)
    for name in (
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
        "VLLM_TRACE_FUNCTION",
    ):
        assert name not in env


def test_h100_profile_avoids_what_breaks_in_confidential_mode() -> None:
    profile = PROFILES["h100-cc"]
    assert profile.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert profile.environment["VLLM_WEIGHT_OFFLOADING_DISABLE_UVA"] == "1"
    assert "--enforce-eager" not in profile.arguments
    assert profile.arguments[profile.arguments.index("--tensor-parallel-size") + 1] == "1"
    assert profile.arguments[profile.arguments.index("--dtype") + 1] == "bfloat16"
    assert profile.versions == ("0.33.0",)
    assert profile.exclusive_uid


def test_every_profile_names_versions_whose_paths_are_known() -> None:
    for profile in PROFILES.values():
        assert profile.versions
        assert set(profile.versions) <= set(PATHS)
    assert len({frozenset(table) for table in PATHS.values()}) == 1


def test_unknown_profile_is_refused_and_echo_is_no_profile() -> None:
    for name in ("echo", "gpu", ""):
        with pytest.raises(EngineError, match="ENGINE_PROFILE"):
            engine.load(Model(name), RUNTIME)


def test_known_profile_is_an_engine_that_is_not_healthy_before_start() -> None:
    made = engine.load(Model(), RUNTIME)
    assert (made.model_id, made.healthy) == ("parrot", False)
    with pytest.raises(RuntimeError):
        _ = made.app


@pytest.mark.parametrize(
    "variable",
    [
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_LOGGING_LEVEL",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_DEBUG_DUMP_PATH",
        "VLLM_SOMETHING_NEW",
        "HF_TOKEN",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "TORCH_LOGS",
    ],
)
def test_variable_that_could_change_the_engine_is_refused_by_name_only(variable: str) -> None:
    wanted = environment(PROFILES["cpu"], RUNTIME)
    with pytest.raises(EngineError, match="ENGINE_ENVIRONMENT") as refused:
        policy.check_environment({variable: "SECRET", "PATH": "/bin"}, wanted)
    assert variable in str(refused.value)
    assert "SECRET" not in str(refused.value)


def test_variables_of_the_profile_itself_are_no_surprise() -> None:
    wanted = environment(PROFILES["cpu"], RUNTIME)
    policy.check_environment({**wanted, "PATH": "/bin", "LANG": "C"}, wanted)
    with pytest.raises(EngineError):
        policy.check_environment({**wanted, "VLLM_PLUGINS": "all"}, wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_log_requests", True),
        ("enable_log_outputs", True),
        ("trust_remote_code", True),
        ("kv_transfer_config", {}),
        ("kv_events_config", {}),
        ("kv_offloading_size", 1.0),
        ("cpu_offload_gb", 1),
        ("otlp_traces_endpoint", "http://x"),
        ("tool_server", "demo"),
        ("middleware", ["x"]),
        ("enable_lora", True),
        ("enable_prompt_tokens_details", False),
        ("enable_scale_out", True),
        ("allowed_local_media_path", "/"),
        ("load_format", "pt"),
        ("uds", "/tmp/x"),
        ("log_error_stack", True),
        ("enable_log_requests", 0),
    ],
)
def test_argument_outside_the_lock_is_refused(name: str, value: Any) -> None:
    good: dict[str, Any] = {key: allowed[0] for key, allowed in LOCK.items()}
    policy.check_arguments(good)
    with pytest.raises(EngineError, match="ENGINE_POLICY") as refused:
        policy.check_arguments({**good, name: value})
    assert name in refused.value.actual


@pytest.mark.parametrize("name", ["cpu", "h100-cc"])
def test_embedding_model_runs_the_pooling_runner_without_a_cache(name: str) -> None:
    line = argv(PROFILES[name], Model(task="embed"))
    assert line[-5:] == ["--runner", "pooling", "--convert", "embed", "--no-enable-prefix-caching"]
    good: dict[str, Any] = {key: allowed[0] for key, allowed in {**LOCK, **LOCK_EMBED}.items()}
    policy.check_arguments(good, "embed")
    for key, value in (("runner", "generate"), ("convert", "none"), ("enable_prefix_caching", True)):
        policy.check_arguments({**good, key: value}, "generate")
        with pytest.raises(EngineError, match="ENGINE_POLICY") as refused:
            policy.check_arguments({**good, key: value}, "embed")
        assert refused.value.actual == key


def test_stale_shared_memory_is_swept_only_where_the_user_runs_nothing_else(tmp_path: Path) -> None:
    for name in ("psm_1", "other"):
        (tmp_path / name).touch()
    engine.sweep([Model("h100-cc"), Model("cpu")], tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"psm_1", "other"}
    engine.sweep([Model("h100-cc"), Model("h100-cc")], tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"other"}


def test_profiler_is_refused() -> None:
    class Profiler:
        profiler = "torch"

    with pytest.raises(EngineError, match="profiler_config"):
        policy.check_arguments({"profiler_config": Profiler()})


def test_installed_version_other_than_the_profiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"vllm": "0.34.0"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EngineError, match="ENGINE_VERSION") as refused:
        policy.installed_version(PROFILES["h100-cc"])
    assert (refused.value.expected, refused.value.actual) == ("0.33.0", "0.34.0")
    found["vllm"] = "0.33.0"
    assert policy.installed_version(PROFILES["h100-cc"]) == "0.33.0"
    found.clear()
    with pytest.raises(EngineError, match="not installed"):
        policy.installed_version(PROFILES["cpu"])


def test_model_directory_is_looked_at_before_minutes_are_spent(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        policy.check_model(tmp_path / "none")
    (tmp_path / "config.json").touch()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(EngineError, match="lacks files") as lacking:
        policy.check_model(tmp_path)
    assert "tokenizer_config.json, *.safetensors" in lacking.value.actual
    (tmp_path / "tokenizer_config.json").touch()
    (tmp_path / "model.safetensors").touch()
    policy.check_model(tmp_path)
