"""LiteLLM, streaming, then asynchronously: it calls the service through the OpenAI client that each call is handed."""

import asyncio
import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no price list is fetched when it is imported

import litellm
from openai import AsyncOpenAI, OpenAI

from attestation.client.script import async_client_for, client_for, exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    litellm.suppress_debug_info = True  # its advertisements on an error
    session = session_from_env()
    service = {"base_url": f"{session.target.origin}/v1", "api_key": os.environ["VOUCHSAFE_API_KEY"]}
    request = {
        "model": f"openai/{os.environ['VOUCHSAFE_MODEL']}",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
    }
    with client_for(session) as http:
        # In every call: without `client` LiteLLM makes one itself.
        stream = litellm.completion(**request, stream=True, client=OpenAI(**service, http_client=http))
        print(verdict(session))
        for event in stream:
            print(event.choices[0].delta.content or "", end="", flush=True)
        print("\nreceipt:", http.receipts.verify_last().verdict)
    client = AsyncOpenAI(**service, http_client=async_client_for(session))
    answer = asyncio.run(litellm.acompletion(**request, client=client))
    print("async:", answer.choices[0].message.content)


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
