"""LiteLLM: it calls the service through the OpenAI client that each call is handed."""

import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no price list is fetched when it is imported

import litellm
from openai import OpenAI

from attestation.client.script import client_for, exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    litellm.suppress_debug_info = True  # its advertisements on an error
    session = session_from_env()
    with client_for(session) as http:
        url = f"{session.target.origin}/v1"
        client = OpenAI(base_url=url, api_key=os.environ["VOUCHSAFE_API_KEY"], http_client=http)
        stream = litellm.completion(
            model=f"openai/{os.environ['VOUCHSAFE_MODEL']}",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
            client=client,  # in every call: without it LiteLLM makes a client itself
        )
        print(verdict(session))
        for event in stream:
            print(event.choices[0].delta.content or "", end="", flush=True)
        print("\nreceipt:", http.receipts.verify_last().verdict)


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
