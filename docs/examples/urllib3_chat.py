"""urllib3 with the verifying SSLContext."""

import os
import sys

import urllib3

from attestation.client.script import exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    session = session_from_env()
    host, port = session.target.address  # where to dial; which service it must be is the session's name
    with urllib3.HTTPSConnectionPool(
        host, port, ssl_context=session.context(), server_hostname=session.name, timeout=60
    ) as pool:
        response = pool.request(
            "POST",
            "/v1/chat/completions",
            json={
                "model": os.environ["VOUCHSAFE_MODEL"],
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
            },
            headers={"Host": session.host, "Authorization": f"Bearer {os.environ['VOUCHSAFE_API_KEY']}"},
        )
        print(verdict(session))
        if response.status != 200:
            sys.exit(f"the service answered {response.status}: {response.data.decode()}")
        print(response.json()["choices"][0]["message"]["content"])


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
