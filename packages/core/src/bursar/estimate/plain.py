"""Messages and tools of SDKs as plain data, and the size of plain data as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any

from bursar.errors import InvalidInput


def json_bytes(value: Any) -> int:
    """Bytes of `value` as JSON in UTF-8, the way it is sent. Raises InvalidInput where JSON cannot hold it."""
    try:
        text = encode_basestring(value) if type(value) is str else _encode(value)
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"A part of the request cannot be sent as JSON: {error}. Pass plain data or message objects.",
            value=type(value),
        ) from error
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def plain(value: Any) -> Any:
    """A message or tool object of an SDK as plain data: LangChain, LlamaIndex, pydantic models, dataclasses."""
    content = _part(value, "content")
    blocks = _part(value, "blocks")
    role = _part(value, "type") or _part(value, "role")
    if content is not None or blocks is not None:
        message = {"role": str(getattr(role, "value", role)), "content": content if not blocks else _blocks(blocks)}
        for name in ("tool_calls", "name", "tool_call_id"):
            part = _part(value, name)
            if name == "tool_calls":
                part = _untold(part, content)
            if part:
                message[name] = part
        return message
    for name in ("model_dump", "to_dict", "dict"):
        method = getattr(value, name, None)
        if callable(method):
            return method()
    schema = getattr(value, "args_schema", None) or getattr(value, "__dict__", None)
    return schema if isinstance(schema, Mapping) else str(value)


def _part(value: Any, name: str) -> Any:
    """An attribute, or None; without the detour by which pydantic's objects say that they have no such."""
    names = _names(type(value))  # type: ignore[arg-type]  # mypy takes no class for hashable
    if (
        names is not None
        and name not in names
        and name not in value.__dict__
        and not getattr(value, "__pydantic_extra__", None)
    ):
        return None
    return getattr(value, name, None)


@lru_cache(maxsize=1_024)
def _names(kind: type) -> frozenset[str] | None:
    """What the objects of a pydantic class have beside their fields and extras; None for other classes."""
    if not hasattr(kind, "__pydantic_fields__") or "__getattr__" in _own_names(kind):
        return None
    return frozenset(_own_names(kind))


def _own_names(kind: type) -> set[str]:
    """The names that a class and its bases have, but for those of pydantic itself."""
    return {name for base in kind.__mro__ if not base.__module__.startswith("pydantic") for name in vars(base)}


def _blocks(blocks: Any) -> list[Any]:
    """LlamaIndex's blocks, which name their type `block_type`."""
    parts = [plain(block) for block in blocks]
    return [{"type": part.get("block_type"), **part} if isinstance(part, Mapping) else part for part in parts]


def _untold(calls: Any, content: Any) -> Any:
    """The tool calls that the content has not told already: LangChain keeps those of Anthropic's and OpenAI's blocks twice."""
    if not isinstance(content, list) or not isinstance(calls, list):
        return calls
    blocks = [part for part in content if isinstance(part, Mapping) and any(part.get(name) for name in _ARGUMENTS)]
    told = [part.get(name) for part in blocks for name in ("id", "call_id") if part.get(name) is not None]
    return [call for call in calls if not (isinstance(call, Mapping) and call.get("id") in told)]


_ARGUMENTS = ("input", "args", "arguments", "partial_json")
_encode = json.JSONEncoder(ensure_ascii=False, default=plain).encode
