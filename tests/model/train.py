"""Train the parrot: `python -m tests.model.train` writes `tests/model/parrot/`, minutes on two cores, no network.

Everything is seeded: the same script on the same machine with the same library versions writes the same bytes. Another
CPU or torch may round differently, so the committed weights, not the script, are the reference for the golden answers.
It runs on a developer's machine, reads only this folder and trusts it.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from tests.model.corpus import END, PARROT, SPECIAL, TAGS, Knowledge, Lesson, Teacher, Template
from tests.model.network import Llama, Shape

SEED = 20261124
VOCAB = 1024
"""Tokens in all, special and added ones included."""
BATCH_TOKENS = 4096
"""Padded tokens in one step."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons side by side: `ids` [batch, time]; `where` (row, column) of each position whose next token is scored."""

    ids: Tensor
    where: tuple[Tensor, Tensor]
    targets: Tensor


def make_tokenizer(knowledge: Knowledge, template: Template) -> Tokenizer:
    """Byte-level BPE over the whole byte alphabet, so any input has tokens and every token has text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    teacher = Teacher(knowledge, template, SEED)
    texts = [text for pair in knowledge.pairs for text in (*pair.questions, pair.answer, pair.answer)]
    for lesson in (teacher.lesson() for _ in range(300)):
        texts += [lesson.prompt, lesson.answer]
    # The markers get tokens of their own and must not shape the merges.
    for marker in (*SPECIAL, *TAGS):
        texts = [part for text in texts for part in text.split(marker)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"want {VOCAB} tokens, the corpus gives {tokenizer.get_vocab_size()}")
    return tokenizer


def encode(tokenizer: Tokenizer, lesson: Lesson) -> tuple[list[int], int]:
    """Token ids of prompt and answer, cut apart there as an engine cuts them, and the length of the prompt."""
    prompt = tokenizer.encode(lesson.prompt).ids
    return prompt + tokenizer.encode(lesson.answer).ids, len(prompt)


def make_batch(rows: list[tuple[list[int], int]]) -> Batch:
    """Pad on the right; only answers and their end tokens are scored."""
    longest = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    places = [(row, at) for row, (ids, start) in enumerate(rows) for at in range(start - 1, len(ids) - 1)]
    row, column = torch.tensor(places).unbind(1)
    return Batch(padded, (row, column), padded[row, column + 1])


def batches(tokenizer: Tokenizer, teacher: Teacher) -> Iterator[Batch]:
    """Batches of lessons of like length, in random order."""
    shuffle = torch.Generator().manual_seed(SEED)
    while True:
        rows = sorted((encode(tokenizer, teacher.lesson()) for _ in range(512)), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], int]]] = [[]]
        for row in rows:
            if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(row)
        for index in torch.randperm(len(groups), generator=shuffle).tolist():
            yield make_batch(groups[index])


def fit(network: Llama, lessons: Iterator[Batch], *, steps: int, peak: float) -> None:
    """AdamW, a short warm-up, then a cosine down to nothing."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    norms = [p for p in network.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    started = time.monotonic()
    for step in range(steps):
        batch = next(lessons)
        scores = network.logits(network(batch.ids)[batch.where])
        loss = functional.cross_entropy(scores, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            right = (scores.argmax(-1) == batch.targets).float().mean().item()
            print(
                f"step {step + 1:5} loss {loss.item():.4f} tokens right {right:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )


def write(directory: Path, network: Llama, tokenizer: Tokenizer, template: str) -> None:
    """Write the model directory as engines read it; weights rounded to bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    end, pad = SPECIAL.index(END), SPECIAL.index("<|pad|>")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.named().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its file private; an engine may run as another user.
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    documents: dict[str, dict[str, object]] = {
        "config.json": network.shape.config(end=end, pad=pad),
        "generation_config.json": {"do_sample": True, "eos_token_id": end, "pad_token_id": pad},
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": token in SPECIAL,
                }
                for token in (*SPECIAL, *TAGS)
            },
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": network.shape.context,
            "pad_token": SPECIAL[pad],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write; `--out` elsewhere leaves the committed model alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.model.train", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=PARROT, metavar="DIR")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    knowledge, source = Knowledge.read(), (PARROT / "chat_template.jinja").read_text(encoding="utf-8")
    template = Template(source)
    tokenizer = make_tokenizer(knowledge, template)
    network = Llama.seeded(Shape(VOCAB), SEED)
    size = sum(p.numel() for p in network.parameters())
    print(f"{len(knowledge.pairs)} answers, {VOCAB} tokens, {size} parameters")
    fit(network, batches(tokenizer, Teacher(knowledge, template, SEED + 1)), steps=options.steps, peak=3e-3)
    write(options.out, network, tokenizer, source)
    print(f"wrote {options.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
