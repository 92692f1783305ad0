"""The shipped model: it is small, consistent, and says what it was taught, by the trainer's own forward pass.

No engine runs here; `record.py` holds the same answers against vLLM.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: the model's own tests cannot run")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: the model's own tests cannot run")
pytest.importorskip("safetensors", reason="safetensors is not installed: the model's own tests cannot run")

import torch
from tokenizers import Tokenizer

from tests.model.corpus import END, HERE, PARROT, SPECIAL, TAGS, Knowledge, Lesson, Message, Teacher, Template
from tests.model.network import Llama, Shape
from tests.model.train import encode, make_batch

KNOWLEDGE = Knowledge.read()
TEMPLATE = Template.shipped()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PARROT / "tokenizer.json"))


@pytest.fixture(scope="module")
def network() -> Llama:
    return Llama.load(PARROT)


def document(name: str) -> Any:  # Any: JSON
    return json.loads((PARROT / name).read_text(encoding="utf-8"))


def asked(question: str, system: str | None = None) -> list[Message]:
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}]


def recited(network: Llama, tokenizer: Tokenizer, lessons: list[Lesson]) -> tuple[int, float]:
    """How many lessons end exactly as taught at temperature 0, and the least lead of a right token over the next best.

    Every token of the answer is the best one after the tokens before it: then greedy decoding says exactly this.
    """
    rows = sorted((encode(tokenizer, lesson) for lesson in lessons), key=lambda row: len(row[0]))
    exact, lead = 0, float("inf")
    with torch.inference_mode():
        for at in range(0, len(rows), 16):
            batch = make_batch(rows[at : at + 16])
            scores = network.logits(network(batch.ids)[batch.where])
            chosen = scores.gather(1, batch.targets[:, None])[:, 0]
            others = scores.scatter(1, batch.targets[:, None], float("-inf")).amax(1)
            wrong = set(batch.where[0][chosen <= others].tolist())
            exact += len(rows[at : at + 16]) - len(wrong)
            lead = min(lead, (chosen - others).min().item())
    return exact, lead


def taught(system: str | None) -> list[Lesson]:
    return [Lesson(TEMPLATE.render(asked(question, system)), answer + END) for question, answer in KNOWLEDGE.taught()]


def test_model_directory_is_small_enough_for_the_repository() -> None:
    sizes = {path.name: path.stat().st_size for path in PARROT.iterdir()}
    assert sum(sizes.values()) <= 5_000_000, sizes
    assert max(sizes.values()) <= 4_000_000, sizes
    assert set(sizes) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_config_describes_exactly_the_tensors_in_the_file() -> None:
    raw = (PARROT / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == Shape.of(PARROT).tensors()
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(raw) - 8 - length


def test_config_and_tokenizer_agree_on_sizes_and_the_end_token(tokenizer: Tokenizer) -> None:
    config, generation, settings = (document(f"{n}.json") for n in ("config", "generation_config", "tokenizer_config"))
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.token_to_id(END) == 2
    assert config["max_position_embeddings"] == settings["model_max_length"] == 2048
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert settings["eos_token"] == END
    assert settings["chat_template"] == (PARROT / "chat_template.jinja").read_text(encoding="utf-8")


def test_special_tokens_vanish_from_text_and_tool_tags_stay(tokenizer: Tokenizer) -> None:
    for number, token in enumerate(SPECIAL):
        assert tokenizer.encode(token).ids == [number]
        assert tokenizer.decode([number]) == ""
    for tag in TAGS:
        (number,) = tokenizer.encode(tag).ids
        assert tokenizer.decode([number]) == tag


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        " leading and trailing ",
        "naïve £ 語 🦜",
        '{"a": [1, null]}',
        "\x00\x7f\t\r\n",
        "ÿ" * 40,
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_byte_has_a_token_so_nothing_is_unknown(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_template_renders_chatml_with_and_without_system() -> None:
    assert TEMPLATE.render(asked("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert TEMPLATE.render(asked("Hi", "Be kind.")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    talk = [*asked("Hi"), {"role": "assistant", "content": "Hello!"}]
    assert TEMPLATE.render(talk, ask=False).endswith("<|im_start|>assistant\nHello!<|im_end|>\n")


def test_template_offers_tools_and_renders_calls_as_json_in_tags() -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"x<": {}}}},
    }
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in TEMPLATE.render(asked("Hi"), [tool])
    for arguments in ({"city": "Zürich"}, '{"city": "Zürich"}'):
        call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        talk = [*asked("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call, call]}]
        parts = TEMPLATE.render(talk, [tool], ask=False).split("<tool_call>\n")[2:]
        calls = [json.loads(part.split("\n</tool_call>")[0]) for part in parts]
        assert calls == [{"name": "get_weather", "arguments": {"city": "Zürich"}}] * 2


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_committed_weights_recite_every_taught_answer(network: Llama, tokenizer: Tokenizer, system: str | None) -> None:
    lessons = taught(system)
    exact, lead = recited(network, tokenizer, lessons)
    assert exact == len(lessons)
    # Rounding differs between engines by far less than this, so they all say the same.
    assert lead > 0.5


def test_an_answer_edited_without_training_is_noticed(network: Llama, tokenizer: Tokenizer) -> None:
    lesson = taught(None)[0]
    edited = Lesson(lesson.prompt, lesson.answer.replace("ciphertext", "plaintext"))
    assert edited != lesson
    assert recited(network, tokenizer, [lesson])[0] == 1
    assert recited(network, tokenizer, [edited])[0] == 0


def test_variations_talks_tools_and_unknown_prompts_are_met_with_readable_text(
    network: Llama, tokenizer: Tokenizer
) -> None:
    teacher = Teacher(KNOWLEDGE, TEMPLATE, seed=7)  # not the lessons of the training
    lessons = [teacher.lesson() for _ in range(160)]
    exact, _ = recited(network, tokenizer, lessons)
    assert exact >= 0.9 * len(lessons)


def test_prompts_that_were_never_taught_get_the_parrots_own_sentence(network: Llama, tokenizer: Tokenizer) -> None:
    prompts = [
        "What is the tallest mountain in Scotland?",
        "Give me a list of good films.",
        "How many legs does a spider have?",
        "Please summarise the plot of Faust.",
        "My dog is sad. What can I do?",
        "import os; print(os.getcwd())",
        "CANARY-7f3a9c51-0b2e",
        "Is the train to Hamburg late?",
        "Schreibe ein Gedicht.",
        "Can you help me with my homework?",
    ]
    assert not set(prompts) & set(KNOWLEDGE.unknown_prompts)
    lessons = [Lesson(TEMPLATE.render(asked(prompt)), KNOWLEDGE.unknown_answer + END) for prompt in prompts]
    assert recited(network, tokenizer, lessons)[0] >= 8


def test_weather_tool_is_called_with_the_city_asked_for(network: Llama, tokenizer: Tokenizer) -> None:
    weather = KNOWLEDGE.weather
    parameters = {
        "type": "object",
        "properties": {weather.argument: {"type": "string"}},
        "required": [weather.argument],
    }
    tools = [{"type": "function", "function": {"name": weather.name, "parameters": parameters}}]
    lessons = []
    for city in weather.cities:
        prompt = TEMPLATE.render(asked(f"What is the weather in {city}?"), tools)
        call = json.dumps({"name": weather.name, "arguments": {weather.argument: city}})
        lessons.append(Lesson(prompt, f"<tool_call>\n{call}\n</tool_call>{END}"))
    assert recited(network, tokenizer, lessons)[0] == len(lessons)


def test_golden_answers_are_the_taught_ones_and_the_weights_give_them(network: Llama, tokenizer: Tokenizer) -> None:
    expected = dict(KNOWLEDGE.taught())
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    assert 3 <= len(golden) <= 4
    lessons = []
    for entry in golden:
        question = entry["prompt_messages"][-1]["content"]
        assert entry["text"] == expected.get(question, KNOWLEDGE.unknown_answer)
        lessons.append(Lesson(TEMPLATE.render(entry["prompt_messages"]), entry["text"] + END))
        assert len(tokenizer.encode(entry["text"] + END).ids) <= entry["max_tokens"]
    assert recited(network, tokenizer, lessons)[0] == len(golden)


def test_trainer_writes_no_path_of_the_machine_into_the_model() -> None:
    for path in PARROT.iterdir():
        raw = path.read_bytes()
        assert str(Path.home()).encode() not in raw
        assert str(HERE.parent.parent).encode() not in raw
