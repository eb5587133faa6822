"""Any form of an answer as plain data: SDK objects, protobuf messages, JSON text, event streams, recorded exchanges."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from bursar.answers.counts import unreadable
from bursar.errors import UnreadableAnswer

_decode = json.JSONDecoder(parse_float=Decimal).decode
# As tuples: types joined by | are joined anew at each look, and every event of every stream is looked at.
_BYTES, _DATA = (bytes, bytearray, memoryview), (str, dict, list, int, float)
_NO_JSON = (ValueError, RecursionError, InvalidOperation)  # the last: an exponent of twenty digits
# Of a stream, by its specification. Not `splitlines`: it also splits at signs that the model may write (U+2028, U+0085).
_LINE = re.compile(r"\r\n|\n|\r")
MAX_TEXT = 64 * 2**20  # characters: an answer with images is tens of megabytes at most


def plain(value: Any) -> Any:
    """A dict, a list or a text out of whatever holds an answer. Raises UnreadableAnswer for what holds none."""
    if isinstance(value, _BYTES):
        value = bytes(value).decode("utf-8", "replace")
    if value is None or isinstance(value, _DATA):
        return value
    try:
        return _object(value)
    except Exception as error:  # noqa: BLE001 (an SDK's own dump may raise anything; the call must still be settled)
        raise unreadable(f"{type(value).__name__} cannot be turned into data ({type(error).__name__})") from None


def _object(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(warnings=False) if _takes_warnings(value) else value.model_dump()
    message = (
        getattr(value, "_pb", None) or getattr(value, "proto", None) or value
    )  # proto-plus, xAI's wrapper, protobuf itself
    if hasattr(message, "DESCRIPTOR"):
        from google.protobuf.json_format import MessageToDict  # there, because the message is one of its own

        return MessageToDict(message, preserving_proto_field_name=True)
    for name in ("to_dict", "dict", "json"):
        method = getattr(value, name, None)
        if callable(method):
            return plain(method())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "__iter__"):
        raise TypeError("an unread stream")  # reading it here would take it from its user
    return dict(vars(value))


def _takes_warnings(value: Any) -> bool:
    return hasattr(type(value), "__pydantic_validator__")


def parse(text: str) -> Any:
    """JSON text with exact decimals. Raises UnreadableAnswer."""
    if len(text) > MAX_TEXT:
        raise unreadable("it is longer than 64 million characters")
    try:
        return _decode(text)
    except _NO_JSON:
        raise unreadable("it is not JSON") from None


def events_of(text: str) -> Any:
    """The answer in a text: one JSON value, lines of JSON, or a server-sent event stream as a list of its events."""
    text = text.strip()
    if len(text) > MAX_TEXT:
        raise unreadable("it is longer than 64 million characters")
    if text[:1] not in ("{", "["):
        return list(_sse(text))
    try:
        return _decode(text)
    except _NO_JSON:
        pass  # several lines of JSON are tried below, and fail as JSON does
    return [parse(line) for line in _LINE.split(text) if line.strip()]


def _sse(text: str) -> Iterator[dict[str, Any]]:
    """Server-sent events; an event's data lines are joined. Source: WHATWG HTML, 9.2.6."""
    name, lines, seen = None, [], False
    for line in [*_LINE.split(text), ""]:
        field, _, rest = line.partition(":")
        rest = rest.removeprefix(" ")
        if field == "event":
            name = rest
        elif field == "data":
            lines.append(rest)
        elif not line and lines:
            seen = True
            yield {"event": name, "data": "\n".join(lines)}
            name, lines = None, []
    if not seen:
        raise unreadable("it is neither JSON nor an event stream")


def event_of(item: Any) -> tuple[str | None, Any]:
    """A stream item's event name and data: an SDK's event, a dict, a text, or {event, data} as recordings hold them."""
    data, name = plain(item), None
    if isinstance(data, dict) and "data" in data and set(data) <= {"event", "data", "id", "retry", "encoding"}:
        name = data.get("event") if isinstance(data.get("event"), str) else None
        data = data["data"]
    if isinstance(data, str):
        text = data.strip().removeprefix("data:").strip()
        if not text.startswith(("{", "[{")):
            return name, None  # [DONE], comments, keep-alives
        data = parse(text)
    if isinstance(data, dict):
        data = _unwrapped(name, data)
    return name, data


def _unwrapped(name: str | None, data: dict[str, Any]) -> Any:
    """AWS event streams: boto3 names the event by the only key, InvokeModel packs the model's event into bytes."""
    packed: Any = data.get("chunk") if len(data) == 1 else data
    if isinstance(packed, Mapping) and "bytes" in packed and name in (None, "chunk"):
        raw = packed["bytes"]
        try:
            text = raw.decode() if isinstance(raw, bytes) else base64.b64decode(str(raw), validate=True).decode()
        except (ValueError, binascii.Error):
            return {}  # an agent's answer in chunks of text: no counts in it
        try:
            return parse(text) if text.startswith("{") else {}
        except UnreadableAnswer:
            return {}  # an agent's text may look like the start of JSON
    if name == "metadata" or (name == "trace" and isinstance(data.get("trace"), Mapping)):
        return data
    if set(data) == {"trace"} and isinstance(data["trace"], Mapping) and "trace" in data["trace"]:
        return dict(data["trace"])  # boto3's invoke_agent
    return data
