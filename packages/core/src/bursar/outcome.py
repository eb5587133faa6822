"""Outcomes: whether a call that ended in an error may have been billed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

MAX_CHAIN = 10
# Nothing had been sent when these were raised (httpx, requests and urllib3, aiohttp, the SDKs' wrappers around them).
_NEVER_SENT = frozenset(
    {
        "ConnectError",
        "ConnectTimeout",
        "PoolTimeout",
        "EndpointConnectionError",
        "NewConnectionError",
        "NameResolutionError",
        "ClientConnectorError",
        "UnsupportedProtocol",
        "LocalProtocolError",
        "InvalidURL",
    }
)
_MAYBE_SENT_STATUS = frozenset({408, 409, 499})  # a time-out or a client gone: generation may have begun


def surely_not_billed(error: BaseException) -> bool:
    """True only for a clear refusal before generation: a 4xx answer, or a connection that was never made.

    A time-out, a cut stream, a 5xx and everything unknown may have been billed. Looks at the error and at its causes.
    """
    seen: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if seen is None:
            return False
        status = status_of(seen)
        if status is not None:
            return refuses(status)
        if isinstance(seen, ConnectionRefusedError) or type(seen).__name__ in _NEVER_SENT:
            return True
        # Not its __context__: that may be an error which the caller was handling when the call began.
        seen = seen.__cause__
    return False


def refuses(status: int) -> bool:
    """Whether an answer of this HTTP status is a clear refusal before generation."""
    return 400 <= status < 500 and status not in _MAYBE_SENT_STATUS


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an SDK's error carries, where it carries one."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        response = SimpleNamespace(status=response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for holder in (error, response):
        for name in ("status_code", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and not isinstance(status, bool) and 100 <= status < 600:
                return status
    return None
