"""What a route needs that is answered in another form than the engine speaks: chat in, chat out, and a translation.

Every answer comes from one chat completion of the engine, so that admission, metering, limits and receipts have one
road. A `Dialect` is made for one request together with the chat request that it stands for, and tells the engine's
answer in the words of its route: whole, or event by event. It holds what one answer needs and does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from enclave.api.errors import Refusal

__all__ = ["Dialect"]


class Dialect(Protocol):
    """How the answer to one request is told to its caller. Bytes are whole server-sent events."""

    def whole(self, answer: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON values
        """The engine's `chat.completion` as the body of a 200. Raises KeyError, TypeError or ValueError for what is
        none: the gateway answers 500 then."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:  # Any: JSON values
        """Events for one `chat.completion.chunk`; the first call gives those that open the stream as well. The last
        chunk has no choices and carries `usage`. Raises as `whole`."""

    def end(self) -> tuple[bytes, bytes]:
        """The engine has said `[DONE]`: what is left to say, and the stream's one last event apart."""

    def failed(self, refusal: Refusal) -> bytes:
        """The last event of a stream that cannot end well."""
