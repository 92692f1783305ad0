"""`POST /v1/embeddings`: OpenAI's parameters, bounded before the engine counts a token.

An input is a text, a list of tokens, or a list of at most 2048 of either kind. What a model makes of `dimensions` is
the engine's to say (400 when its vectors can not be cut short, or not to that length).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from enclave.api.errors import Refusal, Refused
from enclave.api.requests import Route

__all__ = ["EMBEDDINGS"]

MAX_INPUTS: Final = 2048
MAX_TOKEN: Final = 2**31 - 1
MAX_DIMENSIONS: Final = 65536


def _check(document: Mapping[str, Any]) -> None:  # Any: JSON values
    if "input" not in document:
        raise Refused(Refusal(400, "You must provide an input.", code="missing_required_parameter", param="input"))
    _check_input(document["input"])
    if document.get("encoding_format", "float") not in ("float", "base64"):
        _invalid("encoding_format", "encoding_format must be float or base64.")
    dimensions = document.get("dimensions")
    if dimensions is not None and not (_is_integer(dimensions) and 1 <= dimensions <= MAX_DIMENSIONS):
        _invalid("dimensions", "dimensions must be a positive integer.")


def _check_input(given: object) -> None:
    if _is_text(given) or _are_tokens(given):
        return
    if not isinstance(given, list) or not given:
        _invalid("input", "input must be a text or a list, and not empty.")
    if len(given) > MAX_INPUTS:
        _invalid("input", f"input must have at most {MAX_INPUTS} entries.")
    if not (all(map(_is_text, given)) or all(map(_are_tokens, given))):
        _invalid("input", "input must be a text, tokens, or a list of either; none of them empty.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_TOKEN for v in value)
    )


def _invalid(param: str, message: str) -> NoReturn:
    raise Refused(Refusal(400, message, code="invalid_value", param=param))


EMBEDDINGS: Final = Route(
    "/v1/embeddings",
    frozenset(
        {
            "model",
            "input",
            "encoding_format",
            "dimensions",
            "user",
            "store",
            "safety_identifier",
            "provider",
            "cache_salt",
        }
    ),
    task="embed",
    check=_check,
)
