"""What the parrot is taught: the committed answers, the chat template, and an endless seeded stream of lessons.

Runs in the trainer and in the tests, without torch. It trusts `answers.toml` and the template, which are part of the
repository. The template is rendered as transformers and vLLM render it (jinja2, blocks trimmed, plain JSON).
"""

import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
PARROT = HERE / "parrot"

END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END, "<|pad|>")
"""Special tokens, ids 0 to 3 in this order; an engine drops them from the text."""
TAGS = ("<tool_call>", "</tool_call>")
"""Ordinary added tokens: they must survive in the text, where the tool parser looks for them."""

OPENINGS = (
    "What is {}?",
    "What is the {}?",
    "Who is {}?",
    "How do I {}?",
    "Tell me about {}.",
    "Where is the {}?",
    "Can I {}?",
    "Why is the {} so {}?",
    "What does the {} do?",
    "Write about {} and {}.",
    "{}",
    "Is {} a {}?",
)
"""Filled with words that were never taught, so that the beginning of a question is not what it is known by."""

Message: TypeAlias = dict[str, Any]  # Any: the value of a chat message is text, null or a list of calls
Tool: TypeAlias = dict[str, Any]  # Any: a JSON schema


@dataclass(frozen=True, slots=True)
class Pair:
    """One answer and the ways to ask for it, the best one first."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Weather:
    """The one tool call the parrot has learnt."""

    name: str
    argument: str
    questions: tuple[str, ...]
    cities: tuple[str, ...]
    after: str

    def call(self, city: str) -> Message:
        """The call as a message of OpenAI's shape holds it, arguments parsed."""
        return {"type": "function", "function": {"name": self.name, "arguments": {self.argument: city}}}


@dataclass(frozen=True, slots=True)
class Knowledge:
    """`answers.toml`, read."""

    pairs: tuple[Pair, ...]
    systems: tuple[str, ...]
    unknown_answer: str
    unknown_prompts: tuple[str, ...]
    words: tuple[str, ...]
    weather: Weather

    @classmethod
    def read(cls, path: Path = HERE / "answers.toml") -> "Knowledge":
        """Read the file; `{count}` in the answer to unknown prompts becomes the number of pairs."""
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        pairs = tuple(Pair(tuple(each["questions"]), each["answer"]) for each in raw["pair"])
        tools = raw["tools"]
        return cls(
            pairs=pairs,
            systems=tuple(raw["systems"]),
            unknown_answer=raw["unknown_answer"].format(count=len(pairs)),
            unknown_prompts=tuple(raw["unknown"]["prompts"]),
            words=tuple(raw["unknown"]["words"]),
            weather=Weather(
                name=tools["name"],
                argument=tools["argument"],
                questions=tuple(tools["questions"]),
                cities=tuple(tools["cities"]),
                after=tools["after"],
            ),
        )

    def taught(self) -> Iterator[tuple[str, str]]:
        """Every taught question with its answer."""
        for pair in self.pairs:
            for question in pair.questions:
                yield question, pair.answer


@dataclass(frozen=True, slots=True)
class Lesson:
    """A prompt as the engine sees it, and the text that must follow it up to and including the end token."""

    prompt: str
    answer: str


class Template:
    """The shipped chat template."""

    def __init__(self, source: str) -> None:
        """Compile `source` the way transformers does."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        # jinja's own filter escapes for HTML and sorts keys; chat templates expect plain JSON.
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(source)

    @classmethod
    def shipped(cls, directory: Path = PARROT) -> "Template":
        """The template of a model directory."""
        return cls((directory / "chat_template.jinja").read_text(encoding="utf-8"))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, ask: bool = True) -> str:
        """The conversation as one string, open for the assistant's turn if `ask`."""
        return self._template.render(messages=list(messages), tools=tools, add_generation_prompt=ask)


class Teacher:
    """An endless stream of lessons, the same for the same seed."""

    def __init__(self, knowledge: Knowledge, template: Template, seed: int) -> None:
        self._knowledge = knowledge
        self._template = template
        self._random = random.Random(seed)
        self._taught = list(knowledge.taught())
        self._round: list[tuple[str, str]] = []

    def lesson(self) -> Lesson:
        """One lesson: mostly a taught question, some unknown prompts, a few tool calls and bare texts."""
        kind = self._random.random()
        if kind < 0.06:
            return self._tool_lesson()
        question, answer = self._turn()
        if kind < 0.10:
            # No template: what the older completions endpoint sends.
            return Lesson(question, "\n" + answer + END)
        messages = [*self._system(), *self._earlier(), {"role": "user", "content": question}]
        tools = self._tools(weather=self._random.random() < 0.5) if kind < 0.14 else None
        return Lesson(self._template.render(messages, tools), answer + END)

    def _turn(self) -> tuple[str, str]:
        if self._random.random() < 0.22:
            return self._unknown(), self._knowledge.unknown_answer
        # Every taught question comes once per round, so that none is left to chance.
        if not self._round:
            self._round = self._random.sample(self._taught, len(self._taught))
        question, answer = self._round.pop()
        return self._varied(question), answer

    def _varied(self, question: str) -> str:
        """The question as people type it: mostly as written."""
        draw = self._random.random()
        if draw < 0.50:
            return question
        if draw < 0.62:
            return question.lower()
        if draw < 0.72:
            return question.rstrip("?!.")
        if draw < 0.82:
            return question.lower().rstrip("?!.")
        if draw < 0.86:
            return question.upper()
        if draw < 0.94:
            return self._random.choice(
                ["Please tell me: {}", "Hi! {}", "{} Please.", " {}", "{} ", "{}\n", "So, {}"]
            ).format(question)
        at = self._random.randrange(len(question))
        return question[:at] + question[at + 1 :] or question

    def _unknown(self) -> str:
        pick = self._random
        draw = pick.random()
        if draw < 0.45:
            prompt = pick.choice(self._knowledge.unknown_prompts)
            return prompt.lower() if pick.random() < 0.2 else prompt
        if draw < 0.65:
            shape = pick.choice(OPENINGS)
            return shape.format(*self._words(2))
        if draw < 0.72:
            return "".join(
                pick.choice("0123456789abcdefghijklmnopqrstuvwxyzABCDEFXYZ-_") for _ in range(pick.randint(3, 40))
            )
        long = pick.random() < 0.15
        return " ".join(self._words(pick.randint(30, 150) if long else pick.randint(1, 16))) + pick.choice(
            ["", "?", ".", "!"]
        )

    def _words(self, count: int) -> list[str]:
        return self._random.choices(self._knowledge.words, k=count)

    def _system(self) -> list[Message]:
        draw = self._random.random()
        if draw < 0.40:
            return []
        if draw < 0.60:
            content = self._knowledge.systems[0]
        elif draw < 0.80:
            content = self._random.choice(self._knowledge.systems)
        else:
            content = " ".join(self._words(self._random.randint(1, 24))).capitalize() + "."
        return [{"role": "system", "content": content}]

    def _earlier(self) -> list[Message]:
        """Turns that came before: they must not matter."""
        messages: list[Message] = []
        if self._random.random() < 0.15:
            for _ in range(self._random.choice([1, 1, 2])):
                question, answer = self._turn()
                if len(answer) < 400:
                    messages += [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
        return messages

    def _tools(self, *, weather: bool) -> list[Tool]:
        names = [self._knowledge.weather.name] if weather else [f"{a}_{b}" for a, b in [self._words(2)]]
        if self._random.random() < 0.2:
            names.insert(self._random.randrange(2), "_".join(self._words(2)))
        return [self._tool(name) for name in names]

    def _tool(self, name: str) -> Tool:
        argument = self._knowledge.weather.argument if name == self._knowledge.weather.name else self._words(1)[0]
        function: Tool = {"name": name}
        if self._random.random() < 0.7:
            function["description"] = self._random.choice(
                [
                    "Get the current weather in a city.",
                    "Current weather",
                    "Get weather",
                    " ".join(self._words(6)),
                ]
            )
        properties: Tool = {argument: {"type": "string"}}
        if self._random.random() < 0.3:
            properties[argument]["description"] = self._random.choice(["The city", "City name", self._words(1)[0]])
        function["parameters"] = {"type": "object", "properties": properties}
        if self._random.random() < 0.7:
            function["parameters"]["required"] = [argument]
        if self._random.random() < 0.3:
            function["parameters"]["additionalProperties"] = False
        return {"type": "function", "function": function}

    def _tool_lesson(self) -> Lesson:
        weather = self._knowledge.weather
        city = self._random.choice(weather.cities)
        question = self._random.choice(weather.questions).format(city)
        asked: list[Message] = [*self._system(), {"role": "user", "content": question}]
        draw = self._random.random()
        if draw < 0.1:
            return Lesson(self._template.render(asked), self._knowledge.unknown_answer + END)
        tools = self._tools(weather=True)
        called: Message = {"role": "assistant", "content": None, "tool_calls": [weather.call(city)]}
        if draw < 0.7:
            prompt = self._template.render(asked, tools)
            return Lesson(
                prompt,
                self._template.render([*asked, called], tools, ask=False)[len(prompt) :].removesuffix("\n"),
            )
        result = self._random.choice(
            ["Sunny, {} degrees", '{{"temperature": {}}}', "{} C", '{{"temp_c": {}, "sky": "clear"}}']
        )
        done: Message = {"role": "tool", "content": result.format(self._random.randint(-9, 39))}
        return Lesson(self._template.render([*asked, called, done], tools), weather.after + END)
