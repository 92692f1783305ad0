"""The Python examples of docs/examples, run as docs/clients.md says, against the real engine behind the real relay."""

from __future__ import annotations

import pytest

from tests.demo.stack import Stack
from tests.end_to_end.page import EXAMPLES, PAGE, blocks, commands, program
from tests.end_to_end.shell import QUESTION, Shell, known_answer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

IN_PROCESS = commands("in process")
each_command = pytest.mark.parametrize("command", IN_PROCESS)

WITH_RECEIPTS = {"openai_sync.py", "openai_async.py", "langchain_chat.py", "litellm_chat.py"}
ASYNC_TOO = {"langchain_chat.py", "litellm_chat.py"}


def test_page_names_and_runs_every_example() -> None:
    ours = {path.name for path in EXAMPLES.iterdir() if path.name != "node_modules"}
    run = {program(command) for command in IN_PROCESS + commands("by proxy")}
    assert run == ours
    table = PAGE.read_text().partition("\n## ")[0]
    assert {name for name in ours if f"(examples/{name})" not in table} == set()


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.*")}
    assert {name for name, length in lengths.items() if length >= 50} == set()


@each_command
def test_example_verifies_then_answers(shell: Shell, live_stack: Stack, command: str) -> None:
    done = shell.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    first = f"accepted: {live_stack.target}, operator vouchsafe demo operator, "
    assert first in done.stdout and "DEVELOPMENT" in done.stdout
    asked = "Who are you?" if "Who are you?" in command else QUESTION
    assert known_answer(asked) in done.stdout
    if program(command) in WITH_RECEIPTS:
        assert "receipt: accepted" in done.stdout
    if program(command) in ASYNC_TOO:
        assert f"async: {known_answer(asked)}" in done.stdout


@each_command
def test_example_refuses_a_service_of_another_operator_and_says_why(
    shell: Shell, wrong_policy: str, command: str
) -> None:
    done = shell.run(command, VOUCHSAFE_POLICY=wrong_policy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("REFUSED  DEPLOYMENT_OPERATOR: ")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 10


def test_refusal_on_the_page_is_what_the_program_says(shell: Shell, wrong_policy: str) -> None:
    (shown,) = blocks("refusal")
    assert shell.run(IN_PROCESS[0], VOUCHSAFE_POLICY=wrong_policy).stderr == shown


def test_missing_setting_is_named(shell: Shell) -> None:
    done = shell.run(f"unset VOUCHSAFE_POLICY; {IN_PROCESS[0]}")
    assert done.returncode == 2
    assert done.stderr.startswith("error  INPUT_ENVIRONMENT: VOUCHSAFE_POLICY is not set")


def test_cache_lets_the_second_run_judge_without_asking_for_evidence(shell: Shell, live_stack: Stack) -> None:
    cache = live_stack.folder / "cache"
    for _ in range(2):
        done = shell.run(IN_PROCESS[0], VOUCHSAFE_CACHE=str(cache))
        assert done.returncode == 0, done.stderr
        assert len(list(cache.glob("*.bundle"))) == 1
