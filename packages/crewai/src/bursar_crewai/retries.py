"""The retries of the SDKs below CrewAI's clients, made here instead: each is a call that may be billed, and is reserved as one."""

from __future__ import annotations

import random
from typing import Any

_RETRIED_STATUS = frozenset((408, 409, 429))  # and all from 500 on, as the SDKs of OpenAI and Anthropic do
_FIRST_DELAY_S, _LONGEST_DELAY_S, _LONGEST_ASKED_S = 0.5, 8.0, 120.0
_LITELLM_RETRIES = 2  # what it does where nothing is set
_MAX_CHAIN = 10


class _Ours(int):
    """A number of retries that was set here, and not by the user; also in a copy of the client."""


_OURS = _Ours(0)


def take_over(llm: Any, *, is_async: bool) -> int | None:
    """Have the SDK send each request once; how often the guard is to try again. None where the SDK cannot be told."""
    if getattr(llm, "is_litellm", False):
        set_here = isinstance(llm.additional_params.setdefault("max_retries", _OURS), _Ours)
        return _LITELLM_RETRIES if set_here else None
    retries = getattr(llm, "max_retries", None)
    client = _sdk_client(llm, is_async)
    if client is None or type(retries) is not int:
        return None
    client.max_retries = 0
    return retries


def give_back(llm: Any, *, is_async: bool) -> None:
    """Let the SDK retry as the user set it, for a call that no guard holds."""
    if getattr(llm, "is_litellm", False) and isinstance(llm.additional_params.get("max_retries"), _Ours):
        del llm.additional_params["max_retries"]
    retries = getattr(llm, "max_retries", None)
    client = getattr(llm, "_async_client" if is_async else "_client", None)
    if retries and getattr(client, "max_retries", None) == 0:
        client.max_retries = retries  # type: ignore[union-attr]


def delay_s(error: BaseException, tried: int) -> float | None:
    """How long to wait before the call is made again, as the SDK would; None where it would not be."""
    seen: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if seen is None:
            return None
        status = getattr(seen, "status_code", None)
        if isinstance(status, int):
            retried = status in _RETRIED_STATUS or status >= 500
            return _backoff_s(getattr(getattr(seen, "response", None), "headers", {}), tried) if retried else None
        if any(kind.__name__ == "APIConnectionError" for kind in type(seen).__mro__):
            return _backoff_s({}, tried)
        seen = seen.__cause__
    return None


def _backoff_s(headers: Any, tried: int) -> float:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            asked = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if 0 < asked <= _LONGEST_ASKED_S:
            return asked
    return min(_FIRST_DELAY_S * 2.0**tried, _LONGEST_DELAY_S) * (1 - 0.25 * random.random())


def _sdk_client(llm: Any, is_async: bool) -> Any:
    """The SDK's client, built where CrewAI has not built it yet; None where it is not one that can be told."""
    build = getattr(llm, "_get_async_client" if is_async else "_get_sync_client", None)
    if build is None:
        return None
    try:
        client = build()
    except Exception:  # noqa: BLE001 - without a key, or without its extra: the call will say so itself
        return None
    return client if type(getattr(client, "max_retries", None)) is int else None
