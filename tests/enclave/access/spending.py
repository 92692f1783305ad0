"""A ledger on the real journal that is killed: serves requests without end and prints what `settle` returned.

    python -m tests.enclave.access.spending URL

Lines on stdout: `open <recovered>`, then `paid <request id> <cost>` once an entry is durable.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
import time

from enclave.access.budgets import BudgetExceeded, Budgets
from enclave.access.ledger import Ledger
from enclave.access.prices import Usage
from enclave.state import Journal, open_backend
from tests.enclave.access.money import PRICES, receipt

KEY = bytes(range(32))
LIMIT = 5
"""Cents per month for each project."""
CALLERS = 8


async def main(url: str) -> None:
    records: list[bytes] = []
    backend = await open_backend(url)
    journal = await Journal.open(backend, KEY, apply=lambda _, record: records.append(record))
    ledger = await Ledger.open(records, journal.append, PRICES, lambda: int(time.time()))
    print("open", len(ledger.recovered), flush=True)
    await asyncio.gather(ledger.run(0.002), *(caller(ledger, f"proj_{n % 3}") for n in range(CALLERS)))


async def caller(ledger: Ledger, project: str) -> None:
    seed = random.Random()
    while True:
        id = f"rcpt-{secrets.token_hex(16)}"
        try:
            r = await ledger.reserve(
                id, project=project, key_id="key_1", model="parrot", operation="completions",
                amount=PRICES.ceiling("parrot", 1000, 100), budgets=Budgets(project=LIMIT),
            )  # fmt: skip
        except BudgetExceeded:
            await asyncio.sleep(0.01)
            continue
        for tokens in range(seed.randrange(20)):
            r.progress(Usage(1000, 10, tokens))
            await asyncio.sleep(0.001)
        entry = await r.settle("completed", Usage(1000, 10, seed.randrange(100)), receipt)
        # One write call per line: a line is whole or absent.
        os.write(1, f"paid {id} {entry.cost}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
