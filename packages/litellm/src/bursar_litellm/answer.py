"""What a call turned out to be, read from its answer or its error: a cost, nothing, or nobody knows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from bursar.ending import Ending, failed, released, settled, unknown
from bursar.errors import BursarError
from bursar.usage import Usage

log = logging.getLogger("bursar.litellm")
MAX_CHAIN = 10
# Attributes are looked up in `__dict__`: pydantic takes 4 us to say that one is missing.
_NOTHING: Mapping[str, Any] = {}
# LiteLLM gives errors of the connection a status of its own making; below them stands what really happened.
_NEVER_SENT = frozenset(
    ("ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError", "UnsupportedProtocol")
)
_UNREAD = (ValueError, LookupError, TypeError, AttributeError)


def read_answer(provider: str, answer: Any, details: Mapping[str, Any] | None, characters: int) -> Ending:
    """The end of a call that was answered at once.

    `details`: LiteLLM's own notes on the call, which keep the provider's words where it has them; `characters`: the text
    of a call for speech, which is billed by them and answered by sound alone.
    """
    usage = _raw_usage(provider, details)
    if usage is None and is_cached(answer):
        return released("answered from LiteLLM's cache")
    # Of many texts to be embedded the cache may have had some: what was asked for the others is billed.
    usage = usage or read_usage(provider, answer)
    if usage is not None:
        return settled(usage)
    if characters:
        return settled(Usage(input_characters=characters))
    return unknown("the answer states no usage")


def read_error(provider: str, error: BaseException, details: Mapping[str, Any] | None) -> Ending:
    """The end of a call that failed. One that had been answered before is billed, whatever went wrong with it here."""
    usage = _raw_usage(provider, details)
    if usage is not None:
        return settled(usage, outcome="failed", reason=type(error).__name__)
    if details is not None and _is_answer_unread(error):
        return unknown(type(error).__name__)
    return failed(_cause(error))


def read_usage(provider: str, answer: Any, *, final: bool = False) -> Usage | None:
    """The usage that an answer, or the list of events of a stream, tells; None where it tells none that can be read.

    `final`: not what the beginning of a stream tells that was cut.
    Never raises: that would cost the user the answer, and leave the reservation open.
    """
    try:
        usage, region = Usage.from_response(provider, answer), _chat_region(answer)
        return usage if region is None else usage.replace(region=region)
    except BursarError as error:
        partial = None if final else error.fields.get("partial")
        return partial if isinstance(partial, Usage) else None
    except Exception as error:  # noqa: BLE001 - see above
        log.error("the usage of an answer could not be read: %r", error)
        return None


def kept(stream: Any) -> Any:
    """The pieces that a stream of LiteLLM's keeps of itself; None where it keeps none."""
    pieces = getattr(stream, "chunks", None)
    return getattr(getattr(stream, "completion_stream", None), "chunks", None) if pieces is None else pieces


def is_answered(stream: Any) -> bool:
    """Whether the provider has said why a chat or a text ends here."""
    inner = getattr(stream, "completion_stream", None)
    return any(getattr(one, "received_finish_reason", None) is not None for one in (stream, inner))


def tells_last(stream: Any) -> bool:
    """Whether the usage came last: Anthropic's streams begin with a first count, and what follows may be cut off."""
    return bool(getattr((kept(stream) or (None,))[-1], "__dict__", _NOTHING).get("usage"))


def chat_events(stream: Any) -> list[dict[str, Any]]:
    """The usage in the pieces of a chat that LiteLLM keeps, those that it does not show included."""
    events, tier = [], None
    for chunk in kept(stream) or ():
        usage = _field(chunk, "usage")
        tier = _field(chunk, "service_tier") or tier  # LiteLLM leaves it out of the piece that has the usage
        if usage is not None:
            # LiteLLM's own class has names that no provider tells, and these are None.
            usage = usage.model_dump(exclude_none=True) if hasattr(usage, "model_dump") else usage
            events.append(
                {
                    "object": "chat.completion.chunk",
                    "model": getattr(chunk, "model", None),
                    "service_tier": tier,
                    "choices": [],
                    "usage": usage,
                }
            )
    return events


def _chat_region(answer: Any) -> str | None:
    """Where Anthropic says that a chat was made, which LiteLLM keeps in the usage of a stream's pieces."""
    piece = answer[-1] if isinstance(answer, list) and answer else answer
    usage = piece.get("usage") if isinstance(piece, dict) and piece.get("object") == "chat.completion.chunk" else None
    geo = usage.get("inference_geo") if isinstance(usage, dict) else None
    return None if geo in ("", "not_available") else geo


def _field(chunk: Any, name: str) -> Any:
    value = getattr(chunk, "__dict__", _NOTHING).get(name)
    return (getattr(chunk, "__pydantic_extra__", None) or _NOTHING).get(name) if value is None else value


def is_cached(answer: Any) -> bool:
    """Whether LiteLLM answered out of its cache."""
    if getattr(answer, "__dict__", _NOTHING).get("custom_llm_provider") == "cached_response":
        return True
    hidden = getattr(answer, "_hidden_params", None)
    return isinstance(hidden, Mapping) and hidden.get("cache_hit") is True


def _cause(error: BaseException) -> BaseException:
    return next((one for one in _chain(error) if type(one).__name__ in _NEVER_SENT), error)


def _is_answer_unread(error: BaseException) -> bool:
    """Whether LiteLLM made the status of it: of an answer that it could not read. A refused request has the client's error."""
    for one in _chain(error):
        if not type(one).__module__.startswith("litellm"):
            return isinstance(one, _UNREAD)
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _raw_usage(provider: str, details: Mapping[str, Any] | None) -> Usage | None:
    """The usage in the provider's own words, which LiteLLM keeps of answers that were not streamed."""
    raw = None if details is None else details.get("original_response")
    if not isinstance(raw, str) or not raw.lstrip().startswith("{"):
        return None
    with suppress(ValueError):  # more than one object: the reader of events takes them apart
        raw = json.loads(raw)
    return read_usage(provider, raw)
