"""An organisation in a test: its clock, and a store that can be full."""

from __future__ import annotations

import asyncio

from enclave.access.organization import Organization
from enclave.access.secrets import Pepper

STATE_KEY = bytes(range(32))


class World:
    """An organisation, its clock, and what was stored of it."""

    def __init__(self, stored: list[bytes] | None = None, now: int = 1_800_000_000) -> None:
        self.now, self.stored, self.broken = now, [*(stored or [])], False
        self.organization = Organization(Pepper(STATE_KEY), self.append, lambda: self.now)
        for raw in self.stored:
            self.organization.replay(raw)

    async def append(self, raw: bytes) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("the disk is full")
        self.stored.append(raw)

    def again(self) -> World:
        """After a restart."""
        return World(self.stored, self.now)
