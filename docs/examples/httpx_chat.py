"""httpx, streaming, with the verifying SSLContext."""

import json
import os
import sys

import httpx

from attestation.client.script import exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    session = session_from_env()
    host, port = session.target.address  # where to dial; which service it must be is the session's name
    request = {
        "model": os.environ["VOUCHSAFE_MODEL"],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
    }
    headers = {"Host": session.host, "Authorization": f"Bearer {os.environ['VOUCHSAFE_API_KEY']}"}
    with (
        httpx.Client(verify=session.context(), trust_env=False, timeout=60) as http,
        http.stream(
            "POST",
            f"https://{host}:{port}/v1/chat/completions",
            json=request,
            headers=headers,
            extensions={"sni_hostname": session.name},
        ) as response,
    ):
        print(verdict(session))
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
        print()


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
