"""OpenAI's Python SDK, streaming. Every connection is verified, every answer's receipt is checked."""

import os
import sys

from openai import OpenAI

from attestation.client.script import client_for, exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    session = session_from_env()
    with client_for(session) as http:
        url = f"{session.target.origin}/v1"
        client = OpenAI(base_url=url, api_key=os.environ["VOUCHSAFE_API_KEY"], http_client=http)
        stream = client.chat.completions.create(
            model=os.environ["VOUCHSAFE_MODEL"],
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
        )
        print(verdict(session))
        for event in stream:
            for choice in event.choices:
                print(choice.delta.content or "", end="", flush=True)
        print("\nreceipt:", http.receipts.verify_last().verdict)


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
