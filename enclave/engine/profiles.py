"""Engine profiles as data: versions, arguments and environment. What is not written here is not passed to vLLM.

A user can not add an argument or a variable: the configuration names a profile, a path and a length. `LOCK` is what
must hold of the parsed arguments whatever the defaults of a version are; a version whose defaults differ is refused
at boot instead of leaking in service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave.engine.base import Model

__all__ = ["LOCK", "LOCK_EMBED", "PATHS", "PROFILES", "Profile", "argv", "environment"]


@dataclass(frozen=True, slots=True)
class Profile:
    """How vLLM is started on one kind of machine.

    versions     vLLM versions it was written for; others are refused at boot
    arguments    after what the model's entry says
    environment  set before vLLM is imported
    slots        requests that the engine runs at a time
    exclusive_uid   this uid runs nothing else, so shared memory of its own is stale while no engine runs
    """

    name: str
    versions: tuple[str, ...]
    arguments: tuple[str, ...]
    slots: int
    environment: Mapping[str, str]
    exclusive_uid: bool


PATHS: Final[Mapping[str, Mapping[str, str]]] = {
    "0.32.0": {
        "make_arg_parser": "vllm.entrypoints.launchers.cli_args",
        "validate_parsed_serve_args": "vllm.entrypoints.launchers.cli_args",
        "build_async_engine_client": "vllm.entrypoints.launchers.api_server.entry",
        "build_app": "vllm.entrypoints.launchers.app",
        "init_app_state": "vllm.entrypoints.launchers.api_server.app_state",
        "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    },
    "0.33.0": {
        "make_arg_parser": "vllm.entrypoints.common.cli_args",
        "validate_parsed_serve_args": "vllm.entrypoints.common.cli_args",
        "build_async_engine_client": "vllm.entrypoints.launchers.api_server.entry",
        "build_app": "vllm.entrypoints.launchers.app",
        "init_app_state": "vllm.entrypoints.launchers.api_server.app_state",
        "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    },
}
"""Where each version keeps the functions that the mount is built from. They are half private: each version is read."""

_SILENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "VLLM_PLUGINS": "",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Forked children would hold a copy of this process's memory, the TLS and receipt keys with it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # No byte code beside the sources, no progress bars into a sealed stderr.
    "PYTHONDONTWRITEBYTECODE": "1",
    "TQDM_DISABLE": "1",
}
"""No usage statistics, no downloads, no plugins, no name but loopback; vllm.md §10 rows 1, 9, 10, 14, 17, 22."""

_QUIET: Final = (
    "--disable-fastapi-docs",
    "--disable-uvicorn-access-log",
    "--disable-log-stats",
    # The gateway salts every request per key, so a hit never crosses customers.
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
    "--prefix-caching-hash-algo",
    "sha256",
    "--load-format",
    "safetensors",
    "--tensor-parallel-size",
    "1",
    "--mm-processor-cache-gb",
    "0",
)

PROFILES: Final[Mapping[str, Profile]] = {
    "cpu": Profile(
        name="cpu",
        versions=("0.32.0",),
        arguments=(
            *_QUIET,
            "--enforce-eager",
            "--dtype",
            "float32",
        ),
        slots=32,
        environment={
            **_SILENT,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # One child instead of two: the engine core runs the model itself.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        exclusive_uid=False,
    ),
    "h100-cc": Profile(
        name="h100-cc",
        versions=("0.33.0",),
        arguments=(
            *_QUIET,
            "--dtype",
            "bfloat16",
        ),
        slots=256,
        environment={
            **_SILENT,
            # vLLM #57224: in confidential mode the V2 runner reads stale views of pinned memory and answers garbage
            # with status 200. CUDA graphs stay on (PR #52226): eager mode would stall on every copy.
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA": "1",
        },
        exclusive_uid=True,
    ),
}

LOCK: Final[Mapping[str, tuple[object, ...]]] = {
    "enable_log_requests": (False,),
    "enable_log_outputs": (False,),
    "log_error_stack": (False,),
    "trust_remote_code": (False,),
    "trust_request_chat_template": (False,),
    "allowed_local_media_path": ("",),
    "api_server_count": (None, 0, 1),
    "data_parallel_size": (1,),
    "cpu_offload_gb": (0, 0.0),
    "kv_offloading_size": (None,),
    "kv_transfer_config": (None,),
    "kv_events_config": (None,),
    "ec_transfer_config": (None,),
    "otlp_traces_endpoint": (None,),
    "collect_detailed_traces": (None,),
    "enable_lora": (None, False),
    "lora_modules": (None,),
    "tool_server": (None,),
    "tool_parser_plugin": ("",),
    "reasoning_parser_plugin": ("", None),
    "middleware": ([],),
    "enable_sleep_mode": (False,),
    # What a caller is told of the cache is about its own: every request is salted per key.
    "enable_prompt_tokens_details": (True,),
    "enable_request_id_headers": (False,),
    "enable_tokenizer_info_endpoint": (False,),
    "enable_server_load_tracking": (False,),
    "enable_scale_out": (False,),
    "return_tokens_as_token_ids": (False,),
    "load_format": ("safetensors",),
    "prefix_caching_hash_algo": ("sha256",),
    "headless": (False,),
    "uds": (None,),
    "grpc": (False,),
    "config": (None, ""),
    "hf_token": (None,),
    "api_key": (None, [], ""),
    "worker_extension_cls": ("",),
    "logits_processors": (None, []),
    "io_processor_plugin": (None, ""),
    "enable_mm_embeds": (False,),
    "enable_prompt_embeds": (False,),
    "trust_request_mm_kwargs": (False,),
    "weight_transfer_config": (None,),
    "enable_trace_replay": (False,),
}
"""Argument → values it may have after parsing (vllm.md §10). One that a version does not have is nothing to lock."""


LOCK_EMBED: Final[Mapping[str, tuple[object, ...]]] = {
    "runner": ("pooling",),
    "convert": ("embed",),
    # Vectors gain nothing from it, and what is not there needs no salt.
    "enable_prefix_caching": (False,),
}
"""The same for an embedding model, besides `LOCK`."""


def argv(profile: Profile, model: Model) -> list[str]:
    """The whole command line vLLM parses."""
    line = [
        "--model",
        str(model.path),
        "--served-model-name",
        model.id,
        "--max-model-len",
        str(model.max_model_len),
        "--gpu-memory-utilization",  # of the device; on CPU, of the machine
        f"{model.memory_percent / 100:.2f}",
        "--max-num-seqs",
        str(profile.slots),
        *profile.arguments,
    ]
    if model.task == "embed":
        line += ["--runner", "pooling", "--convert", "embed", "--no-enable-prefix-caching"]
    return line


def environment(profile: Profile, runtime: Path) -> dict[str, str]:
    """Every variable that is set for vLLM and its children; directories lie under *runtime*."""
    return {
        **profile.environment,
        "VLLM_CACHE_ROOT": str(runtime / "cache"),
        "VLLM_CONFIG_ROOT": str(runtime / "config"),
        "VLLM_RPC_BASE_PATH": str(runtime / "rpc"),
        "VLLM_LOGGING_CONFIG_PATH": str(runtime / "logging.json"),
        "TORCHINDUCTOR_CACHE_DIR": str(runtime / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(runtime / "cache" / "triton"),
        "XDG_CACHE_HOME": str(runtime / "cache"),
    }
