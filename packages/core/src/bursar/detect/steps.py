"""Reads a run's last step out of a request: what the model asked for, and what came back; every provider's wire format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bursar.estimate.plain import plain

MAX_DEPTH = 8
MOST_ITEMS = 64  # of one step: an answer with more parallel calls than this is compared by its last ones
_CONVERSATIONS = ("messages", "input", "contents", "chat_history")
_ROLES = {
    **dict.fromkeys(("assistant", "model", "ai", "AIMessageChunk", "CHATBOT", "ROLE_ASSISTANT"), "model"),
    **dict.fromkeys(("tool", "function", "TOOL", "ROLE_TOOL"), "tool"),
    **dict.fromkeys(("system", "developer", "SYSTEM", "ROLE_SYSTEM", "ROLE_DEVELOPER"), "system"),
}
# Items of OpenAI's Responses, which have a type and no role.
_TYPES = {
    **dict.fromkeys(("function_call", "custom_tool_call", "mcp_call", "tool_search_call", "computer_call"), "call"),
    **dict.fromkeys(("function_call_output", "custom_tool_call_output", "computer_call_output"), "tool"),
    **dict.fromkeys(("tool_search_output", "local_shell_call_output", "shell_call_output"), "tool"),
    **dict.fromkeys(("reasoning", "web_search_call", "file_search_call", "image_generation_call"), "model"),
    **dict.fromkeys(("code_interpreter_call", "local_shell_call", "shell_call", "mcp_list_tools"), "model"),
}
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode

Calls = tuple[tuple[str, str], ...]


class Step(NamedTuple):
    """One turn of an agent: the (tool, arguments) that the model asked for, and the results; all as text.

    An answer without tool calls is a call of the tool "" whose argument is its text. What the user said next, or a
    framework in the user's name, is a result. `before` is a hash of the item in front of the step, with which the
    request before it ended: it tells which conversation goes on.
    """

    calls: Calls
    results: tuple[str, ...]
    before: int


class _Item(NamedTuple):
    """One message: who it is from ("model", "tool", "system" or "user"), the calls in it, its texts or results.

    `whole`: an answer of the model's is all in here; in Responses it lies in several items.
    """

    sender: str
    calls: list[tuple[str, str]]
    texts: list[str]
    whole: bool = False

    def digest(self) -> int:
        """A hash of what it says, in this process. Ids of calls do not count."""
        return hash((self.sender, tuple(self.calls), tuple(self.texts)))


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


def last_step(items: Sequence[Any]) -> tuple[Step | None, int]:
    """The step that the request goes on from, None where it is the first of its conversation; and a hash of its end.

    Only the end is read, so the cost does not grow with the conversation.
    """
    at = len(items) - 1
    if at < 0:
        return None, 0
    end = (item := _read(items[at])).digest()
    least = max(-1, at - MOST_ITEMS)
    if item.whole and not item.calls and at - 1 > least:  # words put into the model's mouth: its answer begins there
        at -= 1
        item = _read(items[at])
    results: list[str] = []
    returned = False
    while item.sender != "model":
        returned = returned or item.sender == "tool"
        if item.sender != "system":
            results[:0] = item.texts
        at -= 1
        if at <= least:  # a first request; or one whose conversation, with the calls in it, is kept by the provider
            return (Step((), tuple(results), 0) if returned else None), end
        item = _read(items[at])
    calls, texts = list(item.calls), list(item.texts)
    whole = item.whole
    before = 0
    while (at := at - 1) > least:
        item = _read(items[at])
        if whole or item.sender != "model":
            before = item.digest()
            break
        calls[:0], texts[:0] = item.calls, item.texts
        whole = item.whole
    return Step(_asked(calls, texts), tuple(results), before), end


def asked_for(answer: Any) -> Calls:
    """The (tool, arguments) that a whole answer asks for, as in Step; empty where it cannot be read, as for streams."""
    data = answer if isinstance(answer, Mapping) else plain(answer)
    calls: list[tuple[str, str]] = []
    texts: list[str] = []
    read = [_read(message) for message in _messages(data)] if isinstance(data, Mapping) else []
    for item in read:
        if item.sender == "model":
            calls += item.calls
            texts += item.texts
    return _asked(calls, texts) if any(item.sender == "model" for item in read) else ()


def text_of(value: Any) -> str:
    """Any argument or result as text: equal values give equal texts, whatever the order of keys."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        return "\n".join(part["text"] if isinstance(part.get("text"), str) else _json(part) for part in value)
    return "" if value is None else _json(value)


def _asked(calls: list[tuple[str, str]], texts: list[str]) -> Calls:
    return tuple(calls) if calls else (("", "\n".join(texts)),)


def _read(item: Any) -> _Item:
    if not isinstance(item, (dict, str)):
        item = plain(item) if not isinstance(item, Mapping) else item
    if not isinstance(item, Mapping):
        return _Item("user", [], [str(item)])
    role, kind = item.get("role"), item.get("type")
    sender = _ROLES.get(role, "user") if isinstance(role, str) else _TYPES.get(str(kind), "user")
    if sender == "call":
        return _Item("model", [(str(item.get("name") or kind), text_of(item.get("arguments", item.get("input"))))], [])
    if role is None and sender == "tool":
        return _Item("tool", [], [text_of(item.get("output", item.get("tools")))])
    content = item.get("content")
    parts = content if content is not None else item.get("parts")
    calls = _chat_calls(item.get("tool_calls"))
    whole = sender == "model" and kind is None
    if not isinstance(parts, (list, tuple)):
        return _Item(sender, calls, [] if sender == "model" and not parts else [text_of(parts)], whole)
    results: list[str] = []
    words: list[str] = []
    for part in parts:
        _read_part(part, calls, results, words)
    if sender == "user" and results:
        sender = "tool"
    if sender != "model":
        return _Item(sender, [], [*results, "\n".join(words)] if words or not results else results)
    return _Item(sender, calls, words, whole)


def _read_part(part: Any, calls: list[tuple[str, str]], results: list[str], words: list[str]) -> None:
    """Add what one part of a message holds: a call, a result, or words; a picture as its hash."""
    part = part if isinstance(part, (Mapping, str)) else plain(part)
    if not isinstance(part, Mapping):
        words.append(str(part))
        return
    kind, text = part.get("type"), part.get("text")
    if isinstance(text, str):
        if not part.get("thought"):
            words.append(text)
    elif kind == "tool_use":
        calls.append((str(part.get("name")), text_of(part.get("input"))))
    elif kind == "tool_result":
        results.append(text_of(part.get("content")))
    elif isinstance(inner := part.get("functionCall") or part.get("function_call") or part.get("toolUse"), Mapping):
        calls.append((str(inner.get("name")), text_of(inner.get("args", inner.get("input")))))
    elif isinstance(
        inner := part.get("functionResponse") or part.get("function_response") or part.get("toolResult"), Mapping
    ):
        results.append(text_of(inner.get("response", inner.get("content"))))
    elif kind not in ("thinking", "redacted_thinking") and not _SILENT & part.keys():
        words.append(f"[{_fingerprint(part)}]")


_SILENT = frozenset(("cachePoint", "reasoningContent", "thoughtSignature", "thought_signature"))


def _chat_calls(tool_calls: Any) -> list[tuple[str, str]]:
    """The calls of a chat message; LangChain's have no `function` around them, and `args`."""
    calls = []
    for call in tool_calls if isinstance(tool_calls, (list, tuple)) else ():
        call = call if isinstance(call, Mapping) else plain(call)
        if isinstance(call, Mapping):
            inner = call.get("function") or call.get("custom") or call
            inner = inner if isinstance(inner, Mapping) else plain(inner)
            inner = inner if isinstance(inner, Mapping) else {"name": inner}
            calls.append(
                (str(inner.get("name")), text_of(inner.get("arguments", inner.get("args", inner.get("input")))))
            )
    return calls


def _messages(answer: Mapping[str, Any]) -> Sequence[Any]:
    """The model's messages in a whole answer: of the first choice, where there are several."""
    output = answer.get("output")
    if isinstance(output, (list, tuple)):  # Responses
        return output
    if isinstance(output, Mapping):  # Bedrock's Converse
        answer = output
    for name in ("choices", "candidates", "outputs"):
        several = answer.get(name)
        if isinstance(several, (list, tuple)) and several and isinstance(several[0], Mapping):
            answer = several[0]
            break
    message = answer.get("message")
    if message is not None and not isinstance(message, (Mapping, str)):
        message = plain(message)
    if not isinstance(message, Mapping):
        content = answer.get("content")
        message = content if isinstance(content, Mapping) else answer
    if message.get("content") is None and isinstance(message.get("text"), str):  # completions
        message = {"content": message["text"]}
    return ({**message, "role": "assistant"},)


def _json(value: Any) -> str:
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):  # a watch must not end the call that it looks at
        return repr(value)


def _fingerprint(value: Any, depth: int = 0) -> int:
    """A hash of plain data; a picture's megabyte is hashed as it is, and never copied."""
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return hash(tuple((name, _fingerprint(part, depth + 1)) for name, part in value.items()))
        if isinstance(value, (list, tuple)):
            return hash(tuple(_fingerprint(part, depth + 1) for part in value))
    return hash(value) if isinstance(value, (str, bytes, int, float, bool, type(None))) else hash(str(value))
