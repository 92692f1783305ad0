"""LangChain's standard integration tests, unmodified, for ChatOpenAI through the local proxy.

Run by `test_langchain_standard.py` in `.venv-clients`, where LangChain is; never collected by the main test run. What
is switched off below is what the parrot, a model of two million parameters, cannot do; nothing is switched off for the
service or for the proxy.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAIThroughTheProxy(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:  # Any: keyword arguments
        return {
            "base_url": f"{os.environ['VOUCHSAFE_PROXY']}/v1",
            "api_key": os.environ["VOUCHSAFE_API_KEY"],
            "model": os.environ["VOUCHSAFE_MODEL"],
            "temperature": 0,
            "max_retries": 0,  # a failure shows at once
            "stream_usage": True,  # LangChain asks no base URL but OpenAI's own for usage in a stream unless told to
        }

    @property
    def has_tool_calling(self) -> bool:
        return False  # the parrot knows no tool format, so the engine serves it without a tool-call parser

    @property
    def has_tool_choice(self) -> bool:
        return False  # likewise

    @property
    def has_structured_output(self) -> bool:
        return False  # made to write JSON it goes on until its 2048 tokens are used up

    @property
    def supports_json_mode(self) -> bool:
        return False  # likewise

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return os.environ["VOUCHSAFE_MODEL"]  # the one model there is: the road is driven, the answer the same

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False  # its messages carry tool calls

    # Images, audio, video and PDF stay at the suite's own default, off: the parrot reads text.
