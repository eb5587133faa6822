"""Silence of the libraries that deliver: what they log may hold the address of a sink, and with it its token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# The loggers that are handed addresses. A filter of a logger does not hold for those below it, so each is named.
_LOGGERS = (
    "apprise",
    "httpcore.connection",
    "httpcore.http11",
    "httpcore.proxy",
    "httpx",
    "oauthlib.oauth1.rfc5849",
    "requests_oauthlib.oauth1_auth",
    "requests_oauthlib.oauth1_session",
    "requests_oauthlib.oauth2_session",
    "urllib3.connectionpool",
    "urllib3.util.retry",
)
_delivering: ContextVar[bool] = ContextVar("bursar_delivering", default=False)


class _Hush(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _delivering.get()


_HUSH = _Hush()


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block these libraries log nothing from this thread; the program's own use of them logs as ever."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_HUSH)  # the same filter is added once
    token = _delivering.set(True)
    try:
        yield
    finally:
        _delivering.reset(token)
