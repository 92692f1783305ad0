"""LangChain's ChatOpenAI: streamed, then asynchronously. Both of its HTTP clients are ours."""

import asyncio
import os
import sys

from langchain_openai import ChatOpenAI

from attestation.client.script import async_client_for, client_for, exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    session = session_from_env()
    with client_for(session) as http:
        chat = ChatOpenAI(
            base_url=f"{session.target.origin}/v1",
            api_key=os.environ["VOUCHSAFE_API_KEY"],
            model=os.environ["VOUCHSAFE_MODEL"],
            temperature=0,
            http_client=http,  # invoke, stream, batch
            http_async_client=async_client_for(session),  # ainvoke, astream: without it LangChain makes a client itself
        )
        for chunk in chat.stream(question):
            print(chunk.text, end="", flush=True)
        print(f"\n{verdict(session)}\nreceipt:", http.receipts.verify_last().verdict)
        print("async:", asyncio.run(chat.ainvoke(question)).text)


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
