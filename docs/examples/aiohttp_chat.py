"""aiohttp, streaming, with the verifying SSLContext."""

import asyncio
import json
import os
import sys

import aiohttp

from attestation.client.script import exit_on_refusal, session_from_env, verdict


async def main(question: str) -> None:
    session = session_from_env()
    await asyncio.to_thread(session.prepare)  # fetches evidence; without it the first connection would hold the loop up
    host, port = session.target.address  # where to dial; which service it must be is the session's name
    request = {
        "model": os.environ["VOUCHSAFE_MODEL"],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
    }
    headers = {"Host": session.host, "Authorization": f"Bearer {os.environ['VOUCHSAFE_API_KEY']}"}
    async with (
        aiohttp.ClientSession(headers=headers, raise_for_status=True) as http,
        http.post(
            f"https://{host}:{port}/v1/chat/completions",
            json=request,
            ssl=session.context(),
            server_hostname=session.name,
        ) as response,
    ):
        print(verdict(session))
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
        print()


if __name__ == "__main__":
    with exit_on_refusal():
        asyncio.run(main(" ".join(sys.argv[1:]) or "What can the host see?"))
