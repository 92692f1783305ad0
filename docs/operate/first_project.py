"""From an admin key to a project with a key, limits and a bill, with OpenAI's own SDK over verified connections.

VOUCHSAFE_TARGET, VOUCHSAFE_POLICY and VOUCHSAFE_ADMIN_KEY say which service, whose it must be, and who administers it.
The new key is the last line on stdout, once; everything else goes to stderr.
"""

import os
import sys
import time

from openai import OpenAI

from attestation.client.script import client_for, exit_on_refusal, session_from_env, verdict


def main(name: str) -> None:
    session = session_from_env()
    with client_for(session) as http:
        client = OpenAI(
            api_key="none",
            admin_api_key=os.environ["VOUCHSAFE_ADMIN_KEY"],
            base_url=f"{session.target.origin}/v1",
            http_client=http,
        )
        organization, model = client.admin.organization, os.environ["VOUCHSAFE_MODEL"]
        project = organization.projects.create(name=name)
        print(verdict(session), file=sys.stderr)
        permissions = organization.projects.model_permissions
        permissions.update(project.id, mode="allow_list", model_ids=[model])
        limits = organization.projects.rate_limits
        limits.update_rate_limit(f"rl-{model}", project_id=project.id, max_requests_per_1_minute=60)
        spend = organization.projects.spend_limit
        spend.update(project.id, threshold_amount=1000, currency="USD", interval="month")  # cents
        account = organization.projects.service_accounts.create(project.id, name="first program")
        assert account.api_key is not None

        program = OpenAI(
            api_key=account.api_key.value, base_url=f"{session.target.origin}/v1", http_client=http, max_retries=0
        )
        program.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=8)

        day = int(time.time()) - 86400
        for bucket in organization.usage.completions(start_time=day, project_ids=[project.id]).data:
            for used in bucket.results:
                print("used:", used.to_dict(), file=sys.stderr)
        for bucket in organization.usage.costs(start_time=day, project_ids=[project.id]).data:
            for cost in bucket.results:
                print("cost:", cost.to_dict(), file=sys.stderr)
        for event in organization.audit_logs.list(limit=3).data:
            print("log:", event.type, file=sys.stderr)
        print(account.api_key.value)


if __name__ == "__main__":
    with exit_on_refusal():
        main(" ".join(sys.argv[1:]) or "first project")
