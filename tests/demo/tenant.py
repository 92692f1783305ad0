"""What an operator does once a new enclave listens: make its state, a project, and a key to ask with.

The secret and the keys cross the attested channel alone: *http* is a client that has verified the service, but for the
tests that have nothing to verify. Everything after the state is done with the official SDK.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx2
from openai import OpenAI

__all__ = ["Tenant", "set_up"]


@dataclass(frozen=True, slots=True)
class Tenant:
    """The operator's keys, and the first project's."""

    admin_key: str = field(repr=False)
    state_key: str = field(repr=False)
    checkpoint: str
    project: str
    api_key: str = field(repr=False)


def set_up(http: httpx2.Client, base: str, secret: str) -> Tenant:
    """Bootstrap the service at *base* (`https://host[:port]`)."""
    answer = http.post(f"{base}/v1/state/bootstrap", json={"secret": secret})
    if answer.status_code != 200:
        raise RuntimeError(f"bootstrap: {answer.status_code} {answer.json()['error']['code']}")
    born = answer.json()
    admin_key = born["admin_key"]["value"]
    client = OpenAI(api_key="none", admin_api_key=admin_key, base_url=f"{base}/v1", http_client=http, max_retries=0)
    projects = client.admin.organization.projects
    project = projects.create(name="first project")
    account = projects.service_accounts.create(project.id, name="first program")
    assert account.api_key is not None
    return Tenant(admin_key, born["state_key"], born["checkpoint"], project.id, account.api_key.value)
