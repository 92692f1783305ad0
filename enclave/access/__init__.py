"""Who may ask: API keys. Projects, limits and budgets build on the digest that `KeyCheck` returns."""

from enclave.access.keys import KeyCheck

__all__ = ["KeyCheck"]
