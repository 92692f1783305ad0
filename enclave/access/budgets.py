"""Budgets: what was spent this calendar month (UTC), what is reserved, and whether another request still fits.

A request counts in the month in which it is settled. What is open at the turn of a month stays reserved in the new one,
so that `spent + reserved <= limit` holds at every moment of every month, whichever way the open ones end. A limit that
is lowered stops new requests; those that were let in before go on.

One set of numbers: the check reads `Spending.of`, and so does whoever shows a number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from enclave.access.entries import LedgerError
from enclave.access.prices import CENT

__all__ = ["BudgetExceeded", "Budgets", "Spend", "Spending", "month_of"]

ORGANIZATION = ""
"""Under which the sums of all projects are kept: no project has this id."""


class BudgetExceeded(LedgerError):
    """`LEDGER_BUDGET`: does not fit into this month (429 `insufficient_quota`, `x-should-retry: false`).

    scope   whose limit it was: "organization" or "project"
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        # No amount in the message: a log must not tell what a tenant spends.
        hint = "raise the limit, or wait for the next month (UTC)"
        super().__init__("LEDGER_BUDGET", f"the spend limit of the {scope} is reached", hint=hint)


@dataclass(frozen=True, slots=True)
class Budgets:
    """Spend limits in whole cents per calendar month; None: no limit. 0 lets nothing through that costs anything."""

    organization: int | None = None
    project: int | None = None


@dataclass(frozen=True, slots=True)
class Spend:
    """nano-USD of the organisation or a project: settled this month, and reserved for requests being served.

    month   like "2026-11"
    """

    month: str
    spent: int
    reserved: int

    def fits(self, amount: int, limit: int | None) -> bool:
        """Whether *amount* nano-USD more stay within *limit* cents."""
        return limit is None or self.spent + self.reserved + amount <= limit * CENT

    def enforcing(self, limit: int) -> bool:
        """Whether a limit of *limit* cents stops everything that costs anything: OpenAI's `enforcement.status`."""
        return not self.fits(1, limit)


class Spending:
    """The sums. Every call names the time by the ledger's clock, which does not go back."""

    def __init__(self) -> None:
        self._spent: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()
        self._month, self._until = "", 0

    def of(self, project: str | None, time: int) -> Spend:
        """Of *project*, of the whole organisation for None."""
        self._turn(time)
        scope = ORGANIZATION if project is None else project
        return Spend(self._month, self._spent[scope], self._reserved[scope])

    def reserve(self, project: str, amount: int, budgets: Budgets, time: int) -> None:
        """Hold *amount* nano-USD, or raise `BudgetExceeded` and hold nothing."""
        if not self.of(None, time).fits(amount, budgets.organization):
            raise BudgetExceeded("organization")
        if not self.of(project, time).fits(amount, budgets.project):
            raise BudgetExceeded("project")
        for scope in (ORGANIZATION, project):
            self._reserved[scope] += amount

    def release(self, project: str, amount: int) -> None:
        for scope in (ORGANIZATION, project):
            self._reserved[scope] -= amount
        if not self._reserved[project]:
            del self._reserved[project]

    def charge(self, project: str, cost: int, time: int) -> None:
        self._turn(time)
        for scope in (ORGANIZATION, project):
            self._spent[scope] += cost

    def _turn(self, time: int) -> None:
        if time >= self._until:
            self._month, self._until = month_of(time)
            self._spent.clear()


def month_of(time: int) -> tuple[str, int]:
    """The month (UTC) of *time*, like "2026-11", and the unix second at which it is over."""
    now = datetime.fromtimestamp(time, UTC)
    year, month = (now.year + 1, 1) if now.month == 12 else (now.year, now.month + 1)
    return f"{now.year:04d}-{now.month:02d}", int(datetime(year, month, 1, tzinfo=UTC).timestamp())
