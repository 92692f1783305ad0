"""OpenAI's Python SDK under asyncio, streaming. Every connection is verified, every answer's receipt is checked."""

import asyncio
import os
import sys

from openai import AsyncOpenAI

from attestation.client.script import async_client_for, exit_on_refusal, session_from_env, verdict


async def main(question: str) -> None:
    session = session_from_env()
    async with async_client_for(session) as http:
        url = f"{session.target.origin}/v1"
        client = AsyncOpenAI(base_url=url, api_key=os.environ["VOUCHSAFE_API_KEY"], http_client=http)
        stream = await client.chat.completions.create(
            model=os.environ["VOUCHSAFE_MODEL"],
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
        )
        print(verdict(session))
        async for event in stream:
            for choice in event.choices:
                print(choice.delta.content or "", end="", flush=True)
        print("\nreceipt:", http.receipts.verify_last().verdict)


if __name__ == "__main__":
    with exit_on_refusal():
        asyncio.run(main(" ".join(sys.argv[1:]) or "What can the host see?"))
