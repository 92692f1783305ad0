"""Diagnostic notation (RFC 8949 §8) of one CBOR item, by the `cbor-diag` library. Not a test: a program of its own.

Runs in `.venv-peers`. Reads the item on standard input, writes the notation; status 1 when it is no single item.
Without prettifying: a length that is not the shortest shows as `_n`, an indefinite one as `_`.
"""

from __future__ import annotations

import sys

from cbor_diag import cbor2diag


def main() -> None:
    sys.stdout.write(cbor2diag(sys.stdin.buffer.read(), pretty=False))


if __name__ == "__main__":
    main()
