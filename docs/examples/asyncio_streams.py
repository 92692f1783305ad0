"""asyncio's own streams with the verifying SSLContext, on the standard loop or (`--uvloop`) on uvloop."""

import asyncio
import json
import os
import sys

from attestation.client.script import exit_on_refusal, session_from_env, verdict


async def main(question: str) -> None:
    session = session_from_env()
    await asyncio.to_thread(session.prepare)  # fetches evidence; without it the first connection would hold the loop up
    host, port = session.target.address  # where to dial; which service it must be is the session's name
    reader, writer = await asyncio.open_connection(host, port, ssl=session.context(), server_hostname=session.name)
    print(verdict(session))
    body = json.dumps({
        "model": os.environ["VOUCHSAFE_MODEL"],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {session.host}\r\nConnection: close\r\n"
        f"Authorization: Bearer {os.environ['VOUCHSAFE_API_KEY']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer_head, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    if not answer_head.startswith(b"HTTP/1.1 200"):
        sys.exit(f"the service answered {answer.decode()}")
    print(json.loads(answer)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    words = sys.argv[1:]
    factory = None
    if words[:1] == ["--uvloop"]:
        from uvloop import new_event_loop as factory
    with exit_on_refusal(), asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(" ".join(words[words[:1] == ["--uvloop"] :]) or "What can the host see?"))
