"""What a body of the admin API may hold: one row per field, and nothing else passes. Pure.

A refusal names the field and what is expected of it, never what was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from enclave.access.organization import MAX_CENTS, MAX_GRACE, MAX_SECONDS
from enclave.api.errors import Refusal, Refused

__all__ = ["NO_LIMIT", "Field", "boolean", "choice", "invalid", "limit", "number", "read_fields", "text", "texts"]

NO_LIMIT: Final = 2**53 - 1
"""Stands for "not limited" where OpenAI's shapes require an integer: the largest that every JSON reader keeps."""
MAX_LISTED: Final = 256
MAX_TEXT: Final = 256


@dataclass(frozen=True, slots=True)
class Field:
    """One field. *accepts* tells whether a value will do, *expected* says which will.

    required   must be there;  null   may be null, and is passed on as that; otherwise null is as good as absent
    """

    accepts: Callable[[object], bool]
    expected: str
    required: bool = False
    null: bool = False


def read_fields(
    document: Mapping[str, Any],  # Any: JSON values
    fields: Mapping[str, Field],
    unsupported: Collection[str] = (),
) -> dict[str, Any]:
    """Those of *fields* that are in *document*. Raises Refused 400 for one that will not do, that is missing, or that
    nobody knows. *unsupported* are OpenAI's that this service has no use for: null is all they may be."""
    for name, value in document.items():
        if name in unsupported:
            if value is not None:
                raise Refused(Refusal(400, "Unsupported parameter.", code="unsupported_parameter", param=name))
        elif name not in fields:
            message = "Unrecognized request argument supplied."
            raise Refused(Refusal(400, message, code="unknown_parameter", param=name))
    read: dict[str, Any] = {}  # Any: JSON values
    for name, field in fields.items():
        value = document.get(name)
        if value is None:
            if field.required:
                message = f"Missing required parameter: expected {field.expected}."
                raise Refused(Refusal(400, message, code="missing_required_parameter", param=name))
            if field.null and name in document:
                read[name] = None
        elif not field.accepts(value):
            invalid(name, field.expected)
        else:
            read[name] = value
    return read


def invalid(param: str, expected: str) -> NoReturn:
    raise Refused(Refusal(400, f"Invalid value: expected {expected}.", code="invalid_value", param=param))


def text(*, required: bool = False) -> Field:
    """What a name may be is the organisation's to say."""
    return Field(lambda v: isinstance(v, str) and len(v) <= MAX_TEXT, "a string", required)


def texts(*, required: bool = False) -> Field:
    def accepts(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= MAX_LISTED
            and all(isinstance(v, str) and len(v) <= MAX_TEXT for v in value)
        )

    return Field(accepts, f"a list of at most {MAX_LISTED} strings", required)


def boolean() -> Field:
    return Field(lambda v: isinstance(v, bool), "a boolean")


def choice(*values: str, required: bool = False) -> Field:
    return Field(lambda v: isinstance(v, str) and v in values, " or ".join(values), required)


def number(low: int, high: int, *, required: bool = False) -> Field:
    return Field(lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}", required)


def limit() -> Field:
    """Null and NO_LIMIT both take the limit off."""
    return Field(lambda v: type(v) is int and 0 <= v <= NO_LIMIT, f"an integer from 0 to {NO_LIMIT}", null=True)


EXPIRY: Final = number(1, MAX_SECONDS)
GRACE: Final = number(0, MAX_GRACE, required=True)
CENTS: Final = number(0, MAX_CENTS, required=True)
