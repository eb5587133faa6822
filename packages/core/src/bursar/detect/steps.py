"""Reads a run's last step out of a request: what the model asked for, and what came back; every provider's wire format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bursar.estimate.plain import plain

MAX_DEPTH = 8
MOST_ITEMS = 64  # of one step: an answer with more parallel calls than this is compared by its last ones
_CONVERSATIONS = ("messages", "input", "contents", "chat_history")
_MODEL = frozenset(("assistant", "model", "ai", "chatbot", "role_assistant"))
_TOOL = frozenset(("tool", "function", "role_tool"))
_SYSTEM = frozenset(("system", "developer", "role_system"))
_CALLS = frozenset(("function_call", "custom_tool_call", "mcp_call", "tool_search_call", "computer_call"))
_RESULTS = frozenset(("function_call_output", "custom_tool_call_output", "tool_search_output", "computer_call_output"))
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode


class Step(NamedTuple):
    """One turn of an agent: the (tool, arguments) that the model asked for, and the results; all as text.

    An answer without tool calls is a call of the tool "" whose argument is its text. What the user said next, or a
    framework in the user's name, is a result. `before` is the item in front of the step (what the earlier request
    ended with), `last` what the request ends with: they tell which conversation goes on.
    """

    calls: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    before: Any
    last: Any


def conversation(request: Any) -> Sequence[Any]:
    """The list of messages in a wire request, or the messages themselves; empty where there are none."""
    if isinstance(request, Mapping):
        for name in _CONVERSATIONS:
            if isinstance(items := request.get(name), (list, tuple)):
                return items
        request = request.get("prompt") or request.get("input") or request.get("message")
    if isinstance(request, str):
        return (request,)
    return request if isinstance(request, (list, tuple)) else ()


def last_step(items: Sequence[Any]) -> Step | None:
    """The step that the request goes on from; None where the request is the first of its conversation.

    Only the end is read, so the cost does not grow with the conversation.
    """
    results: list[str] = []
    calls: list[tuple[str, str]] = []
    text: list[str] = []
    at = len(items) - 1
    least = max(-1, at - MOST_ITEMS)
    while at > least and (kind := _kind(item := _plain(items[at]))) != "model":
        results.extend(reversed(list(_results(item, kind))))
        at -= 1
    while at > least and _kind(item := _plain(items[at])) == "model":
        _read_answer(item, calls, text)
        at -= 1
    if not calls and not text:
        if not results:
            return None
        if at >= 0 or not any(_kind(_plain(item)) == "tool" for item in items):
            return None
        calls = []  # the conversation is kept by the provider: the calls are known from the answer only
    elif not calls:
        calls = [("", "\n".join(reversed(text)))]
    calls.reverse()
    results.reverse()
    return Step(tuple(calls), tuple(results), items[at] if at >= 0 else None, items[-1])


def asked_for(answer: Any) -> tuple[tuple[str, str], ...]:
    """The (tool, arguments) that a whole answer asks for, as in Step; empty where it cannot be read, as for streams."""
    if not isinstance(answer, (Mapping, list, tuple)):
        answer = plain(answer)
    calls: list[tuple[str, str]] = []
    text: list[str] = []
    for message in reversed(list(_messages(answer))):
        _read_answer(message, calls, text)
    if not calls and text:
        return (("", "\n".join(reversed(text))),)
    return tuple(reversed(calls))


def text_of(value: Any) -> str:
    """Any argument or result as text: equal values give equal texts, whatever the order of keys."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        return "\n".join(part["text"] if isinstance(part.get("text"), str) else _json(part) for part in value)
    return "" if value is None else _json(value)


def digest(item: Any) -> int:
    """A hash of what one message says, whatever form it came in; of this process only. Ids of calls do not count."""
    item = _plain(item)
    calls: list[tuple[str, str]] = []
    texts: list[str] = []
    kind = _kind(item)
    if kind == "model":
        _read_answer(item, calls, texts)
    else:
        texts.extend(_results(item, kind))
    return hash((kind, tuple(calls), tuple(texts)))


def _json(value: Any) -> str:
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):  # a watch must not end the call it looks at
        return repr(value)


def _fingerprint(value: Any, depth: int = 0) -> int:
    """A hash of plain data; a picture's megabyte is hashed as it is, and never copied."""
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return hash(tuple((name, _fingerprint(part, depth + 1)) for name, part in value.items()))
        if isinstance(value, (list, tuple)):
            return hash(tuple(_fingerprint(part, depth + 1) for part in value))
    return hash(value) if isinstance(value, (str, bytes, int, float, bool, type(None))) else hash(str(value))


def _plain(item: Any) -> Mapping[str, Any] | str:
    if isinstance(item, (str, Mapping)):
        return item
    data = plain(item)
    return data if isinstance(data, (str, Mapping)) else str(data)


def _parts(item: Mapping[str, Any]) -> Sequence[Any]:
    parts = item.get("content")
    if parts is None:
        parts = item.get("parts")
    return parts if isinstance(parts, (list, tuple)) else ()


def _role(item: Mapping[str, Any]) -> str:
    role = item.get("role")
    return role.lower() if isinstance(role, str) else ""


def _kind(item: Mapping[str, Any] | str) -> str:
    """Who an item is from: "model", "tool" or "user" (everything else)."""
    if isinstance(item, str):
        return "user"
    role = _role(item)
    if role in _MODEL:
        return "model"
    if role in _TOOL:
        return "tool"
    kind = item.get("type")
    if not role and isinstance(kind, str):
        if kind in _RESULTS:
            return "tool"
        if kind in _CALLS or kind == "reasoning" or kind.endswith("_call"):
            return "model"
    for part in _parts(item):
        if isinstance(part, Mapping) and (part.get("type") == "tool_result" or _field(part, "Response", "Result")):
            return "tool"
    return "user"


def _field(part: Mapping[str, Any], gemini: str, bedrock: str) -> Any:
    """Gemini's functionCall or functionResponse (function_... in snake case), Bedrock's toolUse or toolResult."""
    return part.get(f"function{gemini}") or part.get(f"function_{gemini.lower()}") or part.get(f"tool{bedrock}")


def _results(item: Mapping[str, Any] | str, kind: str) -> Iterator[str]:
    """The results in an item, each as text; the words of a user are one."""
    if isinstance(item, str):
        yield item
        return
    if _role(item) in _SYSTEM:
        return
    if kind == "tool" and "output" in item:
        yield text_of(item["output"])
        return
    parts = _parts(item)
    if not parts:
        yield text_of(item.get("content"))
        return
    words = []
    for part in parts:
        if not isinstance(part, Mapping):
            words.append(str(part))
        elif part.get("type") == "tool_result":
            yield text_of(part.get("content"))
        elif inner := _field(part, "Response", "Result"):
            yield text_of(inner.get("response", inner.get("content")) if isinstance(inner, Mapping) else inner)
        elif isinstance(part.get("text"), str):
            words.append(part["text"])
        elif "cachePoint" not in part:
            words.append(f"[{_fingerprint(part)}]")  # a picture or a document
    if words:
        yield "\n".join(words)


def _read_answer(item: Mapping[str, Any] | str, calls: list[tuple[str, str]], text: list[str]) -> None:
    """Add the calls and the text of one item of the model's, last ones first."""
    if isinstance(item, str):
        text.append(item)
        return
    kind = item.get("type")
    if kind in _CALLS:
        calls.append((str(item.get("name") or kind), text_of(item.get("arguments", item.get("input")))))
        return
    for call in reversed(item.get("tool_calls") or ()):
        call = _plain(call)
        if isinstance(call, Mapping):
            inner = call.get("function")
            inner = inner if isinstance(inner, Mapping) else call
            calls.append((str(inner.get("name")), text_of(inner.get("arguments", inner.get("args")))))
    if isinstance(item.get("content"), str) and item["content"]:
        text.append(item["content"])
    for part in reversed(_parts(item)):
        if not isinstance(part, Mapping):
            text.append(str(part))
        elif part.get("type") == "tool_use" or (part.get("type") in _CALLS):
            calls.append((str(part.get("name")), text_of(part.get("input", part.get("arguments")))))
        elif inner := _field(part, "Call", "Use"):
            calls.append((str(inner.get("name")), text_of(inner.get("args", inner.get("input")))))
        elif isinstance(part.get("text"), str) and not part.get("thought"):
            text.append(part["text"])


def _messages(answer: Any) -> Iterator[Mapping[str, Any] | str]:
    """The model's messages in a whole answer: of the first choice, where there are several."""
    if not isinstance(answer, Mapping):
        return
    if isinstance(output := answer.get("output"), (list, tuple)):  # Responses
        yield from (item for item in map(_plain, output) if isinstance(item, Mapping))
        return
    if isinstance(output, Mapping):  # Bedrock's Converse
        answer = output
    for name in ("choices", "candidates", "outputs"):
        if isinstance(several := answer.get(name), (list, tuple)) and several:
            answer = several[0] if isinstance(several[0], Mapping) else {}
    message = answer.get("message") or answer.get("content") or answer
    if isinstance(message, (list, tuple)):  # Anthropic
        message = {"content": message}
    if isinstance(message, Mapping):
        yield message
    elif isinstance(message, str):
        yield {"content": message}
