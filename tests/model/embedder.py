"""Make the magpie, an embedding model: `python -m tests.model.embedder` writes `magpie/` and `magpie-golden.json`.

Nothing is trained; it takes a second and no network. It is a one-layer Llama whose layer is weak, pooled by the mean
over tokens: a text's vector is near the mean of its tokens' random vectors, so texts that share words are near each
other, and texts that share none are not. That is all it can do, and enough to see that the right text met the right
model. The tokenizer is the parrot's.

Weights are sums of four uniform numbers of Python's own generator, rounded to bfloat16: no library's random numbers, so
the same bytes everywhere. The golden vectors are computed here in plain torch (`network.py`), not by the engine that
they will be held against.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tests.model.corpus import END, HERE, PARROT, SPECIAL
from tests.model.network import Llama, Shape

MAGPIE: Final = HERE / "magpie"
GOLDEN: Final = HERE / "magpie-golden.json"
TEXTS: Final = ("What can the host see?", "yellow bananas", "A receipt is signed by a key that the quote names.")
"""What the self-test asks for."""
SEED: Final = 20261125
SHAPE: Final = Shape(vocab=1024, hidden=64, inner=128, layers=1, heads=2, kv_heads=2, head_dim=32, context=512)
DIMENSIONS: Final = (16, 32, 64)
"""Lengths of a vector that a caller may ask for."""
WEAK: Final = 0.05
"""Standard deviation of the layer's weights; the embeddings' is 1."""


def weights() -> dict[str, Tensor]:
    """Every tensor in bfloat16, under the names of `network.py`, drawn in that order."""
    draw = random.Random(SEED).random

    def number() -> float:
        return (draw() + draw() + draw() + draw() - 2) * 3**0.5  # mean 0, variance 1

    made = {}
    for name, shape in SHAPE.tensors().items():
        if name == "lm_head.weight":
            continue  # an embedding model has none
        count, spread = torch.Size(shape).numel(), 1.0 if "embed" in name else WEAK
        values = [1.0] * count if len(shape) == 1 else [spread * number() for _ in range(count)]
        made[name] = torch.tensor(values, dtype=torch.float64).reshape(shape).to(torch.bfloat16)
    return made


def embed(drawn: dict[str, Tensor], text: str) -> list[float]:
    """The vector of *text*, length 1: mean over its tokens of the hidden states after the last norm."""
    network = Llama(SHAPE, {**drawn, "lm_head.weight": torch.zeros(SHAPE.vocab, SHAPE.hidden)})
    ids = Tokenizer.from_file(str(PARROT / "tokenizer.json")).encode(text).ids
    with torch.inference_mode():
        hidden = network(torch.tensor([ids]))[0].mean(0)
    values: list[float] = functional.normalize(hidden, dim=0).tolist()
    return values


def write(directory: Path, golden: Path) -> None:
    (directory / "1_Pooling").mkdir(parents=True, exist_ok=True)
    settings = json.loads((PARROT / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template")
    settings["model_max_length"] = SHAPE.context
    config = SHAPE.config(end=SPECIAL.index(END), pad=3) | {
        "architectures": ["LlamaModel"],
        "matryoshka_dimensions": list(DIMENSIONS),
    }
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
        for i, k in enumerate(kinds)
    ]
    documents: dict[str, Any] = {
        "config.json": config,
        "tokenizer_config.json": settings,
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": SHAPE.hidden, "pooling_mode_mean_tokens": True},
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_bytes((PARROT / "tokenizer.json").read_bytes())
    drawn = weights()
    # Without the prefix `model.`: the file of a Llama that is a model and not a part of one.
    save_file(
        {n.removeprefix("model."): t for n, t in drawn.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    answers = [{"input": text, "embedding": [round(v, 5) for v in embed(drawn, text)]} for text in TEXTS]
    golden.write_text(json.dumps(answers) + "\n", encoding="utf-8")


def main() -> None:
    """Write model and golden vectors; `--out` elsewhere leaves the committed ones alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.model.embedder", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR")
    out = parser.parse_args().out
    write(out / MAGPIE.name, out / GOLDEN.name)


if __name__ == "__main__":
    main()
