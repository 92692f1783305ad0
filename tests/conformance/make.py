"""Make the conformance table anew: `python -m tests.conformance.make` writes `cases.jsonl`, `blobs.tar.xz`
and the README's numbers.

Everything is signed under throw-away keys that live as long as this process, for one fixed moment. Rows and order
are always the same; keys, and so the bytes, are new each time. Expectations are written down in the row files, never
observed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tests.conformance.book import Book, write
from tests.conformance.bundle_rows import bundle_rows
from tests.conformance.gpu_chain_rows import chain_rows
from tests.conformance.gpu_ocsp_rows import ocsp_rows
from tests.conformance.gpu_report_rows import report_rows
from tests.conformance.gpu_rim_rows import rim_rows
from tests.conformance.page import update
from tests.conformance.tdx_collateral_rows import collateral_rows
from tests.conformance.tdx_form_rows import form_rows
from tests.conformance.tdx_log_rows import log_rows
from tests.conformance.tdx_policy_rows import policy_rows
from tests.conformance.tdx_quote_rows import quote_rows

__all__ = ["hardware", "whole"]


def hardware(kind: Literal["tdx", "gpu"]) -> Book:
    """Every row about one kind of hardware evidence, made now."""
    book = Book(kind)
    parts = {
        "tdx": (quote_rows, collateral_rows, form_rows, log_rows, policy_rows),
        "gpu": (report_rows, chain_rows, ocsp_rows, rim_rows),
    }
    for rows in parts[kind]:
        rows(book)
    return book


def whole() -> Book:
    """Every row about whole enclaves, made now."""
    book = Book("bundle")
    bundle_rows(book)
    return book


if __name__ == "__main__":
    made = [hardware("tdx"), hardware("gpu"), whole()]
    write(made, Path(__file__).parent)
    update([row for book in made for row in book.rows])
    for book in made:
        print(f"{book.kind}: {sum(r['expect'] == 'refused' for r in book.rows)} refused, {len(book.rows)} cases")
