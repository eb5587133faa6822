"""Strict estimates: an upper bound for every request that is admitted, and a reason for every one that is not."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.errors import InvalidInput, UnboundedEstimate
from bursar.estimate import Request, additions, strict
from bursar.estimate.additions import read_additions
from bursar.estimate.media import picture_size
from bursar.estimate.request import FEATURES

DATA = Path(__file__).parent / "data" / "estimates"
with gzip.open(DATA / "answers.jsonl.gz", "rt", encoding="utf-8") as lines:
    ANSWERS = list(map(json.loads, lines))


def request_of(answer: dict[str, Any], **more: Any) -> Request:
    return Request(
        answer["provider"],
        answer["model"] or "",
        body=answer["request"]["body"],
        endpoint=answer["endpoint_kind"],
        **more,
    )


def chat(*messages: dict[str, Any], **fields: Any) -> Request:
    body = {"model": "gpt-4o", "messages": list(messages), "max_tokens": 100, **fields}
    return Request("openai", body["model"], body=body)


HELLO = {"role": "user", "content": "Hello"}


def test_no_recorded_answer_was_billed_more_than_its_bound() -> None:
    admitted = 0
    for answer in ANSWERS:
        request = request_of(answer)
        try:
            bound = strict(request, context_window=1_000_000, max_output_tokens=1_000_000)
        except UnboundedEstimate:
            continue
        admitted += 1
        usage = answer["usage_norm"]
        assert usage["input_tokens"] <= bound.input_tokens, answer["id"]
        assert request.embeds or usage["output_tokens"] <= bound.output_tokens, answer["id"]
    assert admitted > 300


def test_every_recorded_text_request_is_admitted_without_knowing_the_model() -> None:
    requests = [request_of(answer, max_output_tokens=4_096) for answer in ANSWERS]
    text = [request for request in requests if request.kind == "text" and request.limit_covers_reasoning]
    assert len(text) > 250
    for request in text:
        assert strict(request).input_tokens < request.size + 6_000


def test_the_class_is_told_without_the_answer() -> None:
    kinds = {request_of(answer).kind for answer in ANSWERS}
    assert kinds == {"text", "media", "server_tools", "session", "stored", "routed", "generated"}


@given(
    st.recursive(
        st.text() | st.integers() | st.none() | st.booleans(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=20,
    )
)
def test_the_size_is_at_least_the_bytes_of_every_text(value: Any) -> None:
    def texts(node: Any) -> int:
        if isinstance(node, str):
            return len(node.encode("utf-8", "surrogatepass"))
        if isinstance(node, dict):
            return sum(texts(part) for part in node.values())
        return sum(map(texts, node)) if isinstance(node, list) else 0

    request = chat({"role": "user", "content": value})
    assert request.size >= texts(value)
    assert strict(request, context_window=10_000).input_tokens > request.size


def test_what_json_escapes_is_counted_escaped() -> None:
    plain, escaped = chat({"role": "user", "content": "a" * 100}), chat({"role": "user", "content": "\x01" * 100})
    assert escaped.size == plain.size + 500
    assert chat({"role": "user", "content": "\n" * 100}).size == plain.size + 100
    assert chat({"role": "user", "content": "\u20ac" * 100}).size == plain.size + 200


def test_tools_cost_their_json_and_what_the_provider_writes_about_them() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    without, with_tool = strict(chat(HELLO)), strict(chat(HELLO, tools=[tool]))
    assert with_tool.input_tokens >= without.input_tokens + len(json.dumps(tool)) + 1_280


def test_retries_multiply_all_and_answers_the_output() -> None:
    request = Request("openai", "gpt-4o", "Hello", max_output_tokens=100, n=3, retries=2)
    bound = strict(request)
    once = strict(Request("openai", "gpt-4o", "Hello", max_output_tokens=100))
    assert bound.input_tokens == 3 * once.input_tokens
    assert bound.output_tokens == 3 * 3 * 100 == bound.answers * bound.max_output_tokens
    assert strict(chat(HELLO, n=4)).output_tokens == 400
    body = {"contents": [], "generationConfig": {"candidateCount": 2, "maxOutputTokens": 50}}
    assert strict(Request("google", "gemini-2.5-flash", body=body | {"contents": [HELLO]})).output_tokens == 100


def test_the_callers_count_is_the_bound() -> None:
    assert strict(Request("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)).input_tokens == 1_000
    assert (
        strict(
            chat(HELLO, previous_response_id="r"),  # stored, so only the window or the caller bounds it
            context_window=128_000,
        ).input_tokens
        == 128_000
    )


@pytest.mark.parametrize("value", [-1, 1.5, True, "7"])
def test_a_count_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match="whole number"):
        Request("openai", "gpt-4o", input_tokens=value)


def test_without_any_maximum_output_it_is_refused_with_the_remedy() -> None:
    request = Request("openai", "gpt-4o", "Hello")
    with pytest.raises(UnboundedEstimate, match=r"Set max_output_tokens on the call") as caught:
        strict(request)
    assert caught.value.provider == "openai"
    assert strict(request, max_output_tokens=16_384).output_tokens == 16_384
    assert strict(request, context_window=128_000).output_tokens == 128_000


def test_xai_limits_the_answer_but_not_the_reasoning() -> None:
    body = {"messages": [HELLO], "max_tokens": 100}
    with pytest.raises(UnboundedEstimate, match="reasoning"):
        strict(Request("xai", "grok-4-fast-reasoning", body=body))
    assert strict(Request("xai", "grok-4", body=body), max_output_tokens=1_000).output_tokens == 1_100
    assert strict(Request("xai", "grok-4-fast-non-reasoning", body=body)).output_tokens == 100


def test_predicted_text_may_be_billed_as_output() -> None:
    request = chat(HELLO, prediction={"type": "content", "content": "x" * 300})
    assert strict(request).output_tokens >= 400


def test_embeddings_have_no_output_and_no_single_window() -> None:
    texts = ["word " * 2_000] * 10
    bound = strict(Request("openai", "text-embedding-3-small", body={"input": texts}), context_window=8_192)
    assert bound.output_tokens == 0
    assert bound.input_tokens >= 100_000
    numbers = Request("openai", "text-embedding-3-small", body={"input": [[1, 2, 3], [4, 5]]}, endpoint="embeddings")
    assert numbers.token_ids == 5
    assert numbers.size >= 5


ANTHROPIC_SEARCH = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("provider", "model", "fields", "kind"),
    [
        ("openai", "gpt-4o", {"tools": [{"type": "web_search"}]}, "server_tools"),
        ("openai", "gpt-4o", {"tools": [{"type": "mcp", "server_url": "https://x"}]}, "server_tools"),
        ("openai", "gpt-5", {"tools": [{"type": "something_new"}]}, "server_tools"),
        ("openai", "gpt-4o-search-preview", {}, "server_tools"),
        ("openai", "gpt-5", {"reasoning": {"mode": "pro"}}, "server_tools"),
        ("openai", "gpt-5", {"context_management": [{"type": "compaction"}]}, "server_tools"),
        ("google", "gemini-2.5-flash", {"tools": [{"googleSearch": {}}]}, "server_tools"),
        ("google", "gemini-2.5-flash", {"tools": {"codeExecution": {}}}, "server_tools"),
        ("google", "gemini-3", {"tools": [{"functionDeclarations": [], "urlContext": {}}]}, "server_tools"),
        ("xai", "grok-4", {"tools": [{"x_search": {}}]}, "server_tools"),
        ("bedrock", "us.amazon.nova-2", {"toolConfig": {"tools": [{"systemTool": {"name": "g"}}]}}, "server_tools"),
        ("groq", "groq/compound-mini", {}, "server_tools"),
        ("openrouter", "openai/gpt-4o:online", {}, "server_tools"),
        ("openrouter", "openai/gpt-4o", {"plugins": [{"id": "web"}]}, "server_tools"),
        ("anthropic", "claude-sonnet-4-5", {"mcp_servers": [{"url": "https://x"}]}, "server_tools"),
        ("openrouter", "openrouter/auto", {}, "routed"),
        ("openrouter", "openai/gpt-4o", {"models": ["a", "b"]}, "routed"),
        ("azure", "model-router", {}, "routed"),
        ("openai", "gpt-image-1", {}, "generated"),
    ],
)
def test_what_nothing_bounds_is_refused(provider: str, model: str, fields: dict[str, Any], kind: str) -> None:
    request = Request(provider, model, body={"messages": [HELLO], "max_tokens": 10, **fields})
    assert request.kind == kind
    with pytest.raises(UnboundedEstimate) as caught:
        strict(request, context_window=200_000, max_output_tokens=10)
    assert caught.value.reason == request.unbounded_reason


@pytest.mark.parametrize(
    ("provider", "tool"),
    [
        ("openai", {"type": "function", "function": {"name": "f"}}),
        ("openai", {"type": "custom", "name": "f"}),
        ("openai", {"type": "tool_search", "execution": "client"}),
        ("anthropic", {"name": "f", "input_schema": {"type": "object"}}),
        ("anthropic", {"name": "f", "type": "custom", "input_schema": {"type": "object"}}),
        ("google", {"functionDeclarations": [{"name": "f"}]}),
        ("bedrock", {"toolSpec": {"name": "f", "inputSchema": {"json": {}}}}),
        ("xai", {"function": {"name": "f", "parameters": "{}"}}),
    ],
)
def test_the_callers_own_tools_are_no_additions(provider: str, tool: dict[str, Any]) -> None:
    request = Request(provider, "a-model", body={"messages": [HELLO], "tools": [tool], "max_tokens": 10})
    assert (request.kind, request.additions.tools) == ("text", 1)


def test_anthropics_client_tools_bring_a_hidden_prompt() -> None:
    tool = {"type": "memory_20250818", "name": "memory"}
    request = Request("anthropic", "claude-sonnet-4-5", body={"messages": [HELLO], "tools": [tool], "max_tokens": 10})
    assert request.kind == "text"
    assert strict(request).input_tokens > 2 * 1_577  # twice what such a request was billed


@pytest.mark.parametrize(
    ("fields", "rounds"),
    [
        ({"tools": [ANTHROPIC_SEARCH | {"max_uses": 3}]}, 4),
        ({"tools": [ANTHROPIC_SEARCH]}, 11),
        ({"tools": [ANTHROPIC_SEARCH | {"max_uses": 50}]}, 11),
    ],
)
def test_server_tools_with_limited_rounds_are_windows(fields: dict[str, Any], rounds: int) -> None:
    request = Request("anthropic", "claude-sonnet-4-5", body={"messages": [HELLO], "max_tokens": 10, **fields})
    bound = strict(request, context_window=200_000)
    assert (bound.input_tokens, bound.output_tokens) == (200_000 * rounds, 10 * rounds)
    with pytest.raises(UnboundedEstimate, match="context window is not known"):
        strict(request)


def test_openai_bounds_its_tools_by_max_tool_calls() -> None:
    body = {"input": "Hi", "tools": [{"type": "web_search"}], "max_tool_calls": 2, "max_output_tokens": 10}
    assert strict(Request("openai", "gpt-5", body=body), context_window=400_000).input_tokens == 1_200_000


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"cachedContent": "cachedContents/1"},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]},
        {"input": [{"type": "compaction", "encrypted_content": "abc"}]},
    ],
)
def test_what_the_provider_keeps_is_a_window(fields: dict[str, Any]) -> None:
    request = Request("openai", "gpt-5", body={"max_output_tokens": 10, "input": "Hi", **fields})
    assert request.kind == "stored"
    assert strict(request, context_window=400_000).input_tokens == 400_000
    with pytest.raises(UnboundedEstimate, match="which the provider keeps"):
        strict(request)


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


JPEG = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08" + struct.pack(">HH", 480, 640) + b"\x03" * 12


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (png(1_024, 512), (1_024, 512)),
        (JPEG, (640, 480)),
        (b"GIF89a" + struct.pack("<HH", 30, 20) + b"\0" * 8, (30, 20)),
        (b"RIFF\0\0\0\0WEBPVP8X" + b"\0" * 8 + b"\x1f\x03\0\x57\x02\0", (800, 600)),
        (b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + (799 | 599 << 14).to_bytes(4, "little"), (800, 600)),
        (b"RIFF\0\0\0\0WEBPVP8 " + b"\0" * 10 + struct.pack("<HH", 800, 600), (800, 600)),
        (b"\x89PNG\r\n\x1a\n", (0, 0)),
        (b"\xff\xd8\xff\xe0\xff\xff", (0, 0)),
        (b"not a picture", (0, 0)),
    ],
)
def test_picture_sizes_are_read_from_the_header(raw: bytes, size: tuple[int, int]) -> None:
    assert picture_size(raw) == size


@pytest.mark.parametrize(
    ("provider", "model", "part", "least", "most"),
    [
        ("anthropic", "claude-sonnet-4-5", {"type": "image", "source": {"type": "base64", "data": "DATA"}}, 699, 800),
        ("openai", "gpt-4o", {"type": "image_url", "image_url": {"url": "data:image/png;base64,DATA"}}, 765, 1_445),
        ("openai", "gpt-4o", {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}, 85, 85),
        ("openai", "gpt-4o-mini", {"type": "input_image", "image_url": "https://x/y.png"}, 36_835, 48_169),
        (
            "openai",
            "ft:gpt-4o-2024-08-06:o::x",
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,LONG"}},
            765,
            1_445,
        ),
        (
            "openrouter",
            "openai/gpt-4o",
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,LONG"}},
            765,
            1_445,
        ),
        ("azure", "ours", {"type": "image_url", "image_url": {"url": "data:image/png;base64,LONG"}}, 25_501, 48_169),
        ("google", "gemini-2.5-flash", {"inlineData": {"mimeType": "image/png", "data": "DATA"}}, 258, 9_288),
        ("google", "gemini-3-pro", {"fileData": {"mimeType": "image/png", "fileUri": "gs://x"}}, 1_120, 2_304),
        ("bedrock", "us.amazon.nova-pro-v1:0", {"image": {"format": "png", "source": {"bytes": png(9, 9)}}}, 1, 16_384),
    ],
)
def test_pictures_cost_their_published_maximum(
    provider: str, model: str, part: dict[str, Any], least: int, most: int
) -> None:
    data = base64.b64encode(png(1_024, 512)).decode()
    long = base64.b64encode(png(1, 2_048)).decode()  # four tiles, and few patches
    filled = part if provider == "bedrock" else json.loads(json.dumps(part).replace("DATA", data).replace("LONG", long))
    name = "contents" if provider == "google" else "messages"
    inner = "parts" if provider == "google" else "content"
    text = {"role": "user", inner: [{"text": "Look"}]}
    picture = {"role": "user", inner: [{"text": "Look"}, filled]}
    without = strict(Request(provider, model, body={name: [text], "max_tokens": 10}))
    request = Request(provider, model, body={name: [picture], "max_tokens": 10})
    assert request.kind == "media"
    assert least <= strict(request).input_tokens - without.input_tokens <= most + 200


def test_sound_is_bounded_by_its_bytes_and_documents_by_the_window() -> None:
    data = base64.b64encode(bytes(50_000)).decode()
    sound = chat({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]})
    assert 3_200 <= strict(sound).input_tokens <= 4_500
    paper = chat({"role": "user", "content": [{"type": "file", "file": {"file_id": "file_1"}}]})
    assert strict(paper, context_window=128_000).input_tokens == 128_000
    with pytest.raises(UnboundedEstimate, match="document, film or link"):
        strict(paper)


def test_look_alikes_in_the_data_of_tools_are_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}
    body = {
        "max_tokens": 10,
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": picture}]}
        ],
    }
    request = Request("anthropic", "claude-sonnet-4-5", body=body)
    assert request.media == ()
    assert request.size > 50_000


def test_nothing_known_is_a_window_or_refused() -> None:
    request = Request("openai", "gpt-4o", max_output_tokens=10)
    assert strict(request, context_window=128_000).input_tokens == 128_000
    with pytest.raises(UnboundedEstimate, match="neither the messages"):
        strict(request)


def test_message_objects_of_sdks_count_as_their_data() -> None:
    messages = pytest.importorskip("langchain_core.messages")
    call = {"name": "weather", "args": {"city": "Paris"}, "id": "c1", "type": "tool_call"}
    history = [
        messages.SystemMessage("Be brief."),
        messages.HumanMessage(
            [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
        ),
        messages.AIMessage("", tool_calls=[call]),
        messages.ToolMessage("Sunny", tool_call_id="c1"),
    ]
    request = Request("openai", "gpt-4o", history, max_output_tokens=10)
    assert request.messages == 4
    assert len(request.media) == 1
    counts = dict(zip(FEATURES, request.features, strict=True))
    assert (counts["calls"], counts["data"]) == (1, len(json.dumps(call["args"])))


ARGUMENTS = {"query": "weather " * 50}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_use", "id": "c1", "name": "search", "input": ARGUMENTS},
        {"type": "tool_use", "id": "c1", "name": "search", "input": {}, "partial_json": json.dumps(ARGUMENTS)},
        {"type": "function_call", "call_id": "c1", "name": "search", "arguments": json.dumps(ARGUMENTS)},
        {"type": "tool_call", "id": "c1", "name": "search", "args": ARGUMENTS},
    ],
    ids=lambda block: f"{block['type']}-{'partial_json' in block}",
)
def test_a_tool_call_that_stands_in_the_content_too_counts_once(block: dict[str, Any]) -> None:
    """And never less than once: a call that only `tool_calls` holds, or whose block is empty, counts there."""
    messages = pytest.importorskip("langchain_core.messages")
    call = {"name": "search", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}
    size = len(json.dumps(ARGUMENTS))
    told = Request("anthropic", "claude-sonnet-4-6", [messages.AIMessage([block], tool_calls=[call])])
    assert size < told.size < 1.5 * size
    other = Request("anthropic", "claude-sonnet-4-6", [messages.AIMessage([block], tool_calls=[{**call, "id": "c2"}])])
    assert other.size > 2 * size
    emptied = {name: value for name, value in block.items() if name in ("type", "id", "call_id", "name")}
    assert Request("anthropic", "claude-sonnet-4-6", [messages.AIMessage([emptied], tool_calls=[call])]).size > size


def test_a_deep_nest_does_not_exhaust_the_stack() -> None:
    def nest(depth: int) -> Any:
        value: Any = "x"
        for _ in range(depth):
            value = {"content": [value]}
        return value

    assert chat({"role": "user", "content": nest(200)}).size > 2_000
    with pytest.raises(InvalidInput, match="cannot be sent as JSON"):
        chat({"role": "user", "content": nest(100_000)})


def test_a_body_is_looked_through_only_where_it_may_say_something() -> None:
    """All names that are asked for are among those that tell whether to ask."""
    asked: set[str] = set()

    class Body(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    for provider, model in (("perplexity", "sonar"), ("anthropic", "claude"), ("openai", "gpt-4o-search-preview")):
        additions._read(provider, model, "", Body(web_search_options={}))
    assert {"tools", "max_tool_calls", "max_turns", "models"} <= asked
    assert asked <= additions._LOOKED_AT
    assert read_additions("perplexity", "sonar", "", {"max_turns": 3}).rounds == 4
    assert read_additions("openai", "gpt-4o", "", {}).server == ()
