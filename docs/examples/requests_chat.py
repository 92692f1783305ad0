"""requests with the verifying SSLContext: an adapter hands it to every connection."""

import os
import sys

import requests
from requests.adapters import HTTPAdapter

from attestation.client.script import exit_on_refusal, session_from_env, verdict
from attestation.client.session import AttestedSession


class AttestedAdapter(HTTPAdapter):
    def __init__(self, session: AttestedSession) -> None:
        self._session = session
        super().__init__()

    def init_poolmanager(self, *args, **kwargs) -> None:
        super().init_poolmanager(
            *args, ssl_context=self._session.context(), server_hostname=self._session.name, **kwargs
        )


def main(question: str) -> None:
    session = session_from_env()
    host, port = session.target.address  # where to dial; which service it must be is the session's name
    with requests.Session() as http:
        http.trust_env = False  # no proxy of the environment: it could not see inside anyway
        http.mount("https://", AttestedAdapter(session))
        response = http.post(
            f"https://{host}:{port}/v1/chat/completions",
            json={
                "model": os.environ["VOUCHSAFE_MODEL"],
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
            },
            headers={"Host": session.host, "Authorization": f"Bearer {os.environ['VOUCHSAFE_API_KEY']}"},
            timeout=60,
        )
        print(verdict(session))
        response.raise_for_status()
        print(response.json()["choices"][0]["message"]["content"])


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
