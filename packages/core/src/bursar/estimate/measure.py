"""Measures one request in one walk: bytes of text, tool declarations, media, and what the provider keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.estimate.media import Media, read_media
from bursar.estimate.plain import json_bytes, plain


def words(text: str) -> frozenset[str]:
    """The words of a text, for sets of field names."""
    return frozenset(text.split())


OBJECT = (dict, Mapping)  # told from a dict at once, from the abstract class ten times slower
MAX_DEPTH = 64  # deeper than any wire format nests; what lies below is counted as plain JSON

# Top-level fields that never reach the prompt. Every other field is counted, so an unknown one errs on the safe side.
PARAMETERS = words(
    """
    model stream stream_options temperature top_p top_k n max_tokens max_completion_tokens max_output_tokens stop
    stop_sequences service_tier serviceTier user metadata requestMetadata labels seed frequency_penalty
    presence_penalty logit_bias logprobs top_logprobs parallel_tool_calls include store background truncation
    safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention anthropic_version anthropic_beta
    schemaVersion inferenceConfig textGenerationConfig guardrailConfig safetySettings encoding_format dimensions
    output_dimension output_dtype embedding_types input_type usage provider transforms keep_alive options
    tool_choice reasoning reasoning_effort reasoning_format thinking safe_prompt previous_response_id conversation
    cachedContent cached_content context cache_control modalities audio models plugins prediction
    """
)
TOOLS = frozenset(("tools", "functions", "toolConfig", "tool_config", "mcp_servers"))
FORMATS = words(
    "response_format text output_format output_config outputConfig generationConfig generation_config format"
)
CONVERSATION = ("messages", "input", "contents", "chat_history", "prompt", "requests")
# Values that are data of the user's own tools: nothing in them is a medium or a reference, whatever it looks like.
_DATA = frozenset(("arguments", "args", "response", "parameters", "input_schema", "inputSchema", "json", "schema"))
_LABELS = words(
    """
    type role id call_id tool_call_id tool_use_id toolUseId status object detail mime_type mimeType name_
    response_id
    """
)
_REASONING = words(
    """
    encrypted_content signature thoughtSignature thought_signature encrypted_index redactedContent thinking
    reasoning reasoning_content
    """
)
_REASONING_PARTS = frozenset(("reasoning_details", "reasoningContent", "summary"))
_TOOL_RESULTS = frozenset(("functionResponse", "function_response", "toolResult", "tool_result"))
_MEDIA_TYPES = words(
    """
    image image_url input_image file input_file document document_url audio input_audio video video_url
    container_upload media
    """
)
_MEDIA_KEYS = words("image document video audio file inlineData inline_data fileData file_data image_url input_audio")
# Items that stand for content which the provider keeps, so that their bytes say nothing of their tokens.
_STORED = words(
    """
    item_reference compaction web_search_call file_search_call image_generation_call code_interpreter_call
    computer_call mcp_call mcp_list_tools web_search_tool_result web_fetch_tool_result code_execution_tool_result
    bash_code_execution_tool_result text_editor_code_execution_tool_result server_tool_use mcp_tool_result
    """
)

_ESCAPED = bytes(range(32)) + b'"\\'
_NOT_ESCAPED = bytes(b for b in range(256) if b not in _ESCAPED)
_SHORT_ESCAPES = b'"\\\b\f\n\r\t'
_LONG, _BREAK = 128, 16
_WORDS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
_LINES = b"\n\t\r"
_ASCII = bytes(range(128))
_HIGH = bytes(range(128, 256))


class Meter:
    """What one request holds, added up part by part. The text is let go by `close()`; only the counts stay.

    After `close()`: `text_bytes` (UTF-8), of them `wide_bytes` (outside ASCII) and `dense_bytes` (digits and signs,
    which make more tokens a byte than letters do) and `unbroken_bytes` (base64 and the like); `data_bytes` (JSON of
    tool calls and their results) and `calls`, how many there are, `schema_bytes` (JSON of tool declarations),
    `format_bytes` (JSON of output schemas), `reasoning_bytes` (reasoning given back since the last message of the
    user, encrypted or not) and `stale_bytes` (the same before it, which most providers drop), `syntax_bytes` (keys,
    labels, quotes and escapes of the rest), `token_ids` (input that came as token numbers), `messages`, and `marks`,
    the running total after each message.
    """

    __slots__ = (
        "_chars",
        "_texts",
        "calls",
        "data_bytes",
        "dense_bytes",
        "format_bytes",
        "marks",
        "media",
        "messages",
        "reasoning_bytes",
        "schema_bytes",
        "stale_bytes",
        "stored",
        "syntax_bytes",
        "text_bytes",
        "token_ids",
        "unbroken_bytes",
        "wide_bytes",
    )

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._chars = 0
        self.text_bytes = self.wide_bytes = self.dense_bytes = 0
        self.data_bytes = self.schema_bytes = self.format_bytes = self.syntax_bytes = self.token_ids = self.messages = 0
        self.reasoning_bytes = self.stale_bytes = self.unbroken_bytes = self.calls = 0
        self.media: list[Media] = []
        self.stored = ""
        self.marks: list[int] = []

    @property
    def size(self) -> int:
        """Bytes of all that reaches the prompt, as JSON in UTF-8; media left out, a token number counted as one."""
        return (
            self.text_bytes
            + self.data_bytes
            + self.schema_bytes
            + self.format_bytes
            + self.reasoning_bytes
            + self.stale_bytes
            + self.syntax_bytes
            + self.token_ids
        )

    def body(self, body: Mapping[str, Any]) -> None:
        """Count every field of a wire request that can reach the prompt."""
        for key, value in body.items():
            if key in PARAMETERS and not (key == "context" and value):
                continue
            if key in TOOLS:
                self.schema_bytes += json_bytes(value) if value else 0
            elif key in FORMATS and not isinstance(value, str):
                if key in ("generationConfig", "generation_config") and isinstance(value, OBJECT):
                    value = {name: part for name, part in value.items() if "chema" in name}  # the rest are settings
                self.format_bytes += json_bytes(value) if value else 0
            elif key in CONVERSATION and isinstance(value, (list, tuple)):
                self.conversation(value)
            elif value is not None:
                self.syntax_bytes += len(key) + 6
                if isinstance(value, str):
                    self.text(value)
                    self.messages += key not in ("system", "instructions")
                else:
                    self.content(value, 0)

    def conversation(self, messages: Any) -> None:
        """Count a list of messages; the running total after each is how a later call of a run is recognised."""
        if messages and type(messages[0]) is int:  # one text, as token numbers
            self.token_ids += len(messages)
            self.messages += 1
            return
        for message in messages:
            if isinstance(message, (list, tuple)):
                self.token_ids += len(message)
            else:
                data = message if isinstance(message, (str, dict, Mapping)) else plain(message)
                if _is_user_turn(data):  # what was reasoned before it is no longer part of the prompt
                    self.stale_bytes += self.reasoning_bytes
                    self.reasoning_bytes = 0
                self.content(data, 0)
            self.messages += 1
            self.marks.append(self._chars + self.data_bytes + self.stale_bytes + self.reasoning_bytes)

    def text(self, text: str) -> None:
        """Count a text. Long stretches without a break (base64, keys, hashes) make twice the tokens that words do."""
        self._texts.append(text)
        size = len(text)
        self._chars += size
        if size >= _LONG and text.isascii():
            left = size - _BREAK * text.count(" ")
            if left > 0:  # hardly ever of prose
                left -= _BREAK * (text.count("\n") + text.count('"') + text.count(","))
                self.unbroken_bytes += max(0, left)

    def content(self, node: Any, depth: int) -> None:
        """Count any value inside a message: text, parts, media, calls of tools and their results."""
        if isinstance(node, str):
            self.text(node)
        elif isinstance(node, OBJECT):
            self._mapping(node, depth)
        elif isinstance(node, (list, tuple)):
            self.syntax_bytes += 2 * len(node) + 2
            if depth > MAX_DEPTH:
                self.data_bytes += json_bytes(node)
                return
            for item in node:
                self.content(item, depth + 1)
        elif isinstance(node, (bytes, bytearray)):
            self.data_bytes += len(node) * 4 // 3 + 4
        elif node is not None and not isinstance(node, (bool, int, float)):
            self.content(plain(node), depth + 1)
        else:
            self.syntax_bytes += 24

    def _mapping(self, node: Mapping[str, Any], depth: int) -> None:
        if depth > MAX_DEPTH:
            self.data_bytes += json_bytes(node)
            return
        kind = node.get("type")
        if isinstance(kind, str):
            if kind in _MEDIA_TYPES:
                if self._medium(node, kind):
                    return
            elif kind in _STORED or (kind == "reasoning" and "id" in node and not _carries_reasoning(node)):
                self.stored = self.stored or f"an item of type {kind!r}"
        for key, value in node.items():
            self.syntax_bytes += len(key) + 6 if isinstance(key, str) else 32
            if isinstance(value, str):
                if key in _LABELS:
                    self.syntax_bytes += len(value)
                elif key in _REASONING:
                    self.reasoning_bytes += (
                        len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
                    )
                elif key in _DATA:
                    self.calls += 1
                    self.data_bytes += json_bytes(value)
                else:
                    self.text(value)
            elif value is None or value is True or value is False:
                self.syntax_bytes += 5
            elif key == "tools":  # declared in the middle of the conversation
                self.schema_bytes += json_bytes(value)
            elif key in _REASONING_PARTS:
                self.reasoning_bytes += json_bytes(value)
            elif key in _DATA or (key == "input" and kind in ("tool_use", None) and isinstance(value, OBJECT)):
                self.calls += 1
                self.data_bytes += json_bytes(value)
            elif key in _MEDIA_KEYS and isinstance(value, OBJECT) and self._medium(value, key):
                continue
            else:
                self.content(value, depth + 1)

    def _medium(self, node: Mapping[str, Any], kind: str) -> bool:
        """Take the item as a medium if it carries one; a look-alike is counted as what it is: text."""
        if not any(key in node for key in _MEDIUM_FIELDS) and kind not in node:
            return False
        self.media.append(read_media(node, kind))
        title = node.get("title") or node.get("context") or node.get("name") or node.get("filename")
        if isinstance(title, str):
            self.text(title)
        self.syntax_bytes += 64
        return True

    def close(self) -> None:
        """Count the bytes of all text at once and let it go."""
        data = "".join(self._texts).encode("utf-8", "surrogatepass")
        signs = data.translate(None, _WORDS)  # most of a text is gone with the first pass
        escaped = signs.translate(None, _NOT_ESCAPED)
        rare = escaped.translate(None, _SHORT_ESCAPES)
        self.syntax_bytes += len(escaped) + 4 * len(rare)  # \n is one byte more than a line feed, \u0001 five more
        self.text_bytes = len(data)
        self.wide_bytes = len(signs.translate(None, _ASCII))
        self.dense_bytes = len(signs.translate(None, _LINES)) - self.wide_bytes
        self._texts = []


_MEDIUM_FIELDS = words(
    """
    source data base64 url image_url file_id file fileUri file_uri uri bytes file_data document_url video_url
    input_audio image file_url audio video fileId s3Location
    """
)


def _is_user_turn(message: Any) -> bool:
    """Whether the message is the user's own words, not a tool's result in the user's name."""
    if isinstance(message, str):
        return True
    if str(message.get("role")).lower() not in ("user", "role_user", "human"):
        return False
    parts = message.get("content") or message.get("parts")
    if isinstance(parts, (list, tuple)):
        return not any(
            isinstance(part, OBJECT) and (part.get("type") in _TOOL_RESULTS or _TOOL_RESULTS & part.keys())
            for part in parts
        )
    return True


def _carries_reasoning(node: Mapping[str, Any]) -> bool:
    return bool(node.get("encrypted_content") or node.get("content") or node.get("summary"))
