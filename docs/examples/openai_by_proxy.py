"""OpenAI's Python SDK through the local proxy: nothing of vouchsafe in the program, only the base URL."""

import os
import sys

import openai


def main(question: str) -> None:
    proxy = os.environ.get("VOUCHSAFE_PROXY", "http://127.0.0.1:8080")
    client = openai.OpenAI(base_url=f"{proxy}/v1", api_key=os.environ["VOUCHSAFE_API_KEY"])
    try:
        stream = client.chat.completions.create(
            model=os.environ["VOUCHSAFE_MODEL"],
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
        )
        for event in stream:
            for choice in event.choices:
                print(choice.delta.content or "", end="", flush=True)
        print()
    except openai.APIError as err:  # the proxy's own errors come in OpenAI's shape, refusals included
        sys.exit(f"error: {err}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What can the host see?")
