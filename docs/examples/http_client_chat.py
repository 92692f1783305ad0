"""The standard library alone: http.client with the verifying SSLContext."""

import http.client
import json
import os
import sys

from attestation.client.fetch import dial
from attestation.client.script import exit_on_refusal, session_from_env, verdict


def main(question: str) -> None:
    session = session_from_env()
    context = session.context()
    connection = http.client.HTTPSConnection(session.name, session.target.port, context=context, timeout=60)
    if session.target.connect is not None:  # DNS does not know the name: hand over a verified connection
        connection.sock = context.wrap_socket(dial(session.target, 60), server_hostname=session.name)
    request = {
        "model": os.environ["VOUCHSAFE_MODEL"],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['VOUCHSAFE_API_KEY']}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
    print(verdict(session))
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    if response.status != 200:
        sys.exit(f"the service answered {response.status}: {body}")
    print(body["choices"][0]["message"]["content"])


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "What can the host see?")
