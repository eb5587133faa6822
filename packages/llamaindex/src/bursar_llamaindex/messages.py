"""LlamaIndex's messages as they are sent: plain data, which takes less time to measure than its pydantic objects."""

from __future__ import annotations

import json
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock

_SENT = ("tool_calls", "function_call", "tool_call_id")  # of a message's additional_kwargs


def plain_messages(conversation: Any) -> Any:
    """The messages of a conversation, those of text and tool calls as dicts; a prompt, and other messages, as they are."""
    if not isinstance(conversation, (list, tuple)):
        return conversation
    return [_plain(message) if type(message) is ChatMessage else message for message in conversation]


def _plain(message: ChatMessage) -> Any:
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in message.blocks:
        if type(block) is TextBlock:
            texts.append({"type": "text", "text": block.text})
        elif type(block) is ToolCallBlock:
            asked = block.tool_kwargs
            called = {
                "name": block.tool_name,
                "arguments": asked if isinstance(asked, str) else json.dumps(asked, default=str),
            }
            calls.append({"type": "function", "id": block.tool_call_id, "function": called})
        else:
            return message
    content = texts[0]["text"] if len(texts) == 1 else texts
    plain: dict[str, Any] = {"role": message.role.value, "content": content or None}
    if calls:
        plain["tool_calls"] = calls
    for name in _SENT:
        # Older histories keep the calls of tools here; beside blocks that tell of them, they are not sent.
        if name not in plain and (value := message.additional_kwargs.get(name)):
            plain[name] = value
    return plain
