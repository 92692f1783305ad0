"""Make the conformance table anew: `python -m tests.conformance.make` writes `cases.jsonl` and `blobs.tar.xz`.

Everything is signed under throw-away keys that live as long as this process, for one fixed moment. Rows and order
are always the same; keys, and so the bytes, are new each time. Expectations are written down in the row files, never
observed.
"""

from __future__ import annotations

from pathlib import Path

from tests.conformance.book import Book, write
from tests.conformance.gpu_chain_rows import chain_rows
from tests.conformance.gpu_report_rows import report_rows
from tests.conformance.gpu_rim_rows import rim_rows
from tests.conformance.tdx_collateral_rows import collateral_rows
from tests.conformance.tdx_log_rows import log_rows
from tests.conformance.tdx_policy_rows import policy_rows
from tests.conformance.tdx_quote_rows import quote_rows

__all__ = ["books"]


def books() -> list[Book]:
    """Every row of the table, made now."""
    tdx = Book("tdx")
    quote_rows(tdx)
    collateral_rows(tdx)
    log_rows(tdx)
    policy_rows(tdx)
    gpu = Book("gpu")
    report_rows(gpu)
    chain_rows(gpu)
    rim_rows(gpu)
    return [tdx, gpu]


if __name__ == "__main__":
    made = books()
    write(made, Path(__file__).parent)
    for book in made:
        print(f"{book.kind}: {sum(r['expect'] == 'refused' for r in book.rows)} refused, {len(book.rows)} cases")
