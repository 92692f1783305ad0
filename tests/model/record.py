"""Ask the real engine every taught question and record the golden answers: `python -m tests.model.record`.

Runs vLLM's CPU build offline, in one process, on a developer's machine. It counts exact temperature-0 answers over the
whole corpus, under three system messages, and writes `golden.json` only from the engine's own output, only where that
equals the corpus. It trusts nothing but the files of this folder.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.model.corpus import HERE, PARROT, Knowledge, Message

GOLDEN = ("What can the host see?", "What is vouchsafe?", "What is a receipt?", "How do I bake bread?")
"""What `golden.json` holds: three taught questions, and one that is not."""
SYSTEMS = (None, "You are a helpful assistant.", "Answer briefly, in plain words.")
"""No system message, the usual one, and one that was not in the lessons."""
THRESHOLD = 0.95

Dtype: TypeAlias = Literal["float32", "bfloat16"]


def engine(model: Path, dtype: Dtype, scratch: str) -> Any:  # Any: vllm.LLM, which only some installations have
    """An offline engine in this process; the environment must be set before vLLM is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        DO_NOT_TRACK="1",
        VLLM_PLUGINS="",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_CI_ENV="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_LOOPBACK_IP="127.0.0.1",
        VLLM_CACHE_ROOT=scratch,
        VLLM_CONFIG_ROOT=scratch,
        VLLM_RPC_BASE_PATH=scratch,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        max_model_len=2048,
        max_num_seqs=32,
        disable_log_stats=True,
    )


def ask(llm: Any, conversations: list[list[Message]], max_tokens: int) -> tuple[list[str], int]:  # Any: as above
    """Temperature-0 texts, one per conversation, and how many tokens they took."""
    from vllm import SamplingParams

    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)
    return [out.outputs[0].text for out in outputs], sum(len(out.outputs[0].token_ids) for out in outputs)


def conversation(question: str, system: str | None) -> list[Message]:
    """One user turn, with or without a system message."""
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}]


def measure(llm: Any, knowledge: Knowledge) -> float:  # Any: as above
    """Print exact answers per system message and tokens per second; return the worst share."""
    taught = list(knowledge.taught())
    shares = []
    for system in SYSTEMS:
        started = time.monotonic()
        texts, tokens = ask(llm, [conversation(question, system) for question, _ in taught], 512)
        seconds = time.monotonic() - started
        wrong = [(question, text) for (question, answer), text in zip(taught, texts, strict=True) if text != answer]
        shares.append(1 - len(wrong) / len(taught))
        print(f"system {system!r}: {len(taught) - len(wrong)} of {len(taught)} exact, {tokens / seconds:.0f} tokens/s")
        for question, text in wrong:
            print(f"  {question!r}: {text[:120]!r}")
    return min(shares)


def main() -> int:
    """Measure the whole corpus in vLLM on CPU and write golden.json; exit 1, writing nothing, below the threshold."""
    parser = argparse.ArgumentParser(prog="python -m tests.model.record", description=main.__doc__)
    parser.add_argument("--model", type=Path, default=PARROT, metavar="DIR")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dry-run", action="store_true", help="measure only")
    options = parser.parse_args()
    knowledge = Knowledge.read()
    expected = dict(knowledge.taught())
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        llm = engine(options.model, options.dtype, scratch)
        share = measure(llm, knowledge)
        golden = []
        for question in GOLDEN:
            texts, tokens = ask(llm, [conversation(question, None)], 512)
            if texts[0] != expected.get(question, knowledge.unknown_answer):
                print(f"{question!r} is answered otherwise than taught: {texts[0]!r}")
                share = 0.0
            golden.append({"prompt_messages": conversation(question, None), "max_tokens": tokens + 8, "text": texts[0]})
        started = time.monotonic()
        _, tokens = ask(llm, [conversation("Tell me a long story", None)], 512)
        print(f"one stream: {tokens} tokens, {tokens / (time.monotonic() - started):.0f} tokens/s")
    print(f"worst share of exact answers: {share:.1%} (at least {THRESHOLD:.0%} wanted)")
    if share < THRESHOLD:
        return 1
    if not options.dry_run:
        (HERE / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
