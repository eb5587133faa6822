"""Every door of LiteLLM: chat, responses, messages and the bridges between them, images, sound, reranking, batches."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import litellm
import pytest

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_litellm import LiteLLMBudgetExceeded

PROMPT = "abc " * 1_000
MESSAGES = [{"role": "user", "content": PROMPT}]
COST_NANOS = 7_500_000
CLAUDE_NANOS = 10_500_000


Guarded = Callable[..., AbstractContextManager[Bursar]]


def openai(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"model": "openai/gpt-4o", "api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0, **more}


def claude(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"model": "anthropic/claude-sonnet-4-5", "api_base": provider.url, "api_key": "any", **more}


def run(call: Any) -> Any:
    async def awaited() -> Any:
        answer = await call
        return [chunk async for chunk in answer] if hasattr(type(answer), "__anext__") else answer

    return asyncio.run(awaited())


def read(answer: Any) -> Any:
    return list(answer) if hasattr(type(answer), "__next__") else answer


DOORS: dict[str, tuple[Any, int]] = {
    "responses": (lambda p: litellm.responses(**openai(p), input=PROMPT, max_output_tokens=500), COST_NANOS),
    "responses-stream": (
        lambda p: read(litellm.responses(**openai(p), input=PROMPT, max_output_tokens=500, stream=True)),
        COST_NANOS,
    ),
    "aresponses": (lambda p: run(litellm.aresponses(**openai(p), input=PROMPT, max_output_tokens=500)), COST_NANOS),
    "aresponses-stream": (
        lambda p: run(litellm.aresponses(**openai(p), input=PROMPT, max_output_tokens=500, stream=True)),
        COST_NANOS,
    ),
    "messages": (
        lambda p: run(litellm.anthropic_messages(**claude(p), messages=MESSAGES, max_tokens=500)),
        CLAUDE_NANOS,
    ),
    "messages-stream": (
        lambda p: run(litellm.anthropic_messages(**claude(p), messages=MESSAGES, max_tokens=500, stream=True)),
        CLAUDE_NANOS,
    ),
    "anthropic": (lambda p: litellm.completion(**claude(p), messages=MESSAGES, max_tokens=500), CLAUDE_NANOS),
    "anthropic-stream": (
        lambda p: read(litellm.completion(**claude(p), messages=MESSAGES, max_tokens=500, stream=True)),
        CLAUDE_NANOS,
    ),
    "anthropic-astream": (
        lambda p: run(litellm.acompletion(**claude(p), messages=MESSAGES, max_tokens=500, stream=True)),
        CLAUDE_NANOS,
    ),
    # bridges: one of LiteLLM's functions serves another, and both announce the call
    "responses-by-chat": (
        lambda p: litellm.responses(**claude(p), input=PROMPT, max_output_tokens=500),
        CLAUDE_NANOS,
    ),
    "aresponses-by-chat": (
        lambda p: run(litellm.aresponses(**claude(p), input=PROMPT, max_output_tokens=500)),
        CLAUDE_NANOS,
    ),
    "aresponses-by-chat-stream": (
        lambda p: run(litellm.aresponses(**claude(p), input=PROMPT, max_output_tokens=500, stream=True)),
        CLAUDE_NANOS,
    ),
    "messages-by-responses": (
        lambda p: run(litellm.anthropic_messages(**openai(p), messages=MESSAGES, max_tokens=500)),
        COST_NANOS,
    ),
    "chat-by-responses": (
        lambda p: litellm.completion(
            **openai(p) | {"model": "openai/responses/gpt-4o"}, messages=MESSAGES, max_tokens=500
        ),
        COST_NANOS,
    ),
    "achat-by-responses": (
        lambda p: run(
            litellm.acompletion(**openai(p) | {"model": "openai/responses/gpt-4o"}, messages=MESSAGES, max_tokens=500)
        ),
        COST_NANOS,
    ),
}


@pytest.mark.parametrize("name", list(DOORS))
def test_every_door_is_counted_once(name: str, provider: Provider, guarded: Guarded) -> None:
    call, cost_nanos = DOORS[name]
    with guarded() as bursar:
        call(provider)
    (record,) = bursar.records()
    assert (record.outcome, record.estimated, record.cost_nanos) == ("completed", False, cost_nanos)
    assert provider.billed_calls == 1


@pytest.mark.parametrize("name", list(DOORS))
def test_every_door_refuses_before_anything_is_sent(name: str, provider: Provider, broke: Guarded) -> None:
    with broke() as bursar, pytest.raises(LiteLLMBudgetExceeded) as caught:
        DOORS[name][0](provider)
    assert provider.requests == 0
    assert caught.value.status_code == 402
    assert [record.outcome for record in bursar.records()] == ["blocked"]


def test_anthropics_cached_tokens_are_booked_as_such(provider: Provider, guarded: Guarded) -> None:
    """Reads and both kinds of writes, in a plain answer; in a stream LiteLLM passes on the sum of the writes."""
    provider.script(
        Answer(
            input_tokens=1_000,
            output_tokens=10,
            cache_read_tokens=400,
            cache_write_5m_tokens=100,
            cache_write_1h_tokens=hour,
        )
        for hour in (200, 0)
    )
    with guarded() as bursar:
        litellm.completion(**claude(provider), messages=MESSAGES, max_tokens=50)
        read(litellm.completion(**claude(provider), messages=MESSAGES, max_tokens=50, stream=True))
    plain, streamed = bursar.records()
    assert (plain.usage["cache_write_1h_tokens"], plain.usage["cache_write_5m_tokens"]) == (200, 100)
    assert plain.usage["cache_read_tokens"] == streamed.usage["cache_read_tokens"] == 400
    assert streamed.usage["cache_write_5m_tokens"] == 100
    assert plain.usage["input_tokens"] == streamed.usage["input_tokens"] == 1_000


# -- what is not a chat ------------------------------------------------------------------------------------------


_BEGUN = {"id": "m", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": []} | {
    "usage": {"input_tokens": 1_000, "output_tokens": 1}
}


class _Media(BaseHTTPRequestHandler):
    """The endpoints that the provider for tests does not serve, answered in the words of the real ones."""

    ANSWERS: ClassVar[dict[str, Any]] = {
        "/v1/images/generations": {
            "created": 1,
            "data": [{"b64_json": "AAAA"}],
            "usage": {
                "input_tokens": 50,
                "output_tokens": 1_000,
                "total_tokens": 1_050,
                "input_tokens_details": {"text_tokens": 50, "image_tokens": 0},
            },
        },
        "/v1/audio/transcriptions": {
            "text": "hello",
            "usage": {
                "type": "tokens",
                "input_tokens": 100,
                "output_tokens": 20,
                "total_tokens": 120,
                "input_token_details": {"audio_tokens": 100, "text_tokens": 0},
            },
        },
        "/v1/completions": {
            "id": "c",
            "object": "text_completion",
            "created": 1,
            "model": "gpt-3.5-turbo-instruct",
            "choices": [{"text": "x", "index": 0, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500},
        },
        "/v2/rerank": {
            "id": "r",
            "results": [{"index": 0, "relevance_score": 0.5}],
            "meta": {"billed_units": {"search_units": 1}},
        },
        "/v1/messages": b"".join(  # a stream that ends in the middle, as one whose connection was closed does
            b"data: " + json.dumps(event).encode() + b"\n\n"
            for event in (
                {"type": "message_start", "message": _BEGUN},
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "long " * 50}},
            )
        ),
        "/v1/moderations": {"id": "m", "model": "omni-moderation-latest", "results": [{"flagged": False}]},
    }

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1  # type: ignore[attr-defined]
        answer = b"sound" if "speech" in self.path else self.ANSWERS[self.path]
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "audio/mpeg" if "speech" in self.path else "text/event-stream" if body is answer else "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output is for the test."""


@pytest.fixture(scope="module")
def serving() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Media)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def media(serving: ThreadingHTTPServer) -> ThreadingHTTPServer:
    serving.requests = 0  # type: ignore[attr-defined]
    return serving


def media_calls(server: ThreadingHTTPServer) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    at = {"api_base": f"{url}/v1", "api_key": "any"}
    sound = ("a.wav", b"RIFF0000WAVE", "audio/wav")
    return {
        "image": lambda: litellm.image_generation(model="gpt-image-1", prompt="a cat", **at),
        "aimage": lambda: run(litellm.aimage_generation(model="gpt-image-1", prompt="a cat", **at)),
        "speech": lambda: litellm.speech(model="openai/tts-1", input="x" * 1_000, voice="alloy", **at),
        "aspeech": lambda: run(litellm.aspeech(model="openai/tts-1", input="x" * 1_000, voice="alloy", **at)),
        "transcription": lambda: litellm.transcription(model="openai/gpt-4o-transcribe", file=sound, **at),
        "atranscription": lambda: run(litellm.atranscription(model="openai/gpt-4o-transcribe", file=sound, **at)),
        "text": lambda: litellm.text_completion(model="gpt-3.5-turbo-instruct", prompt=PROMPT, max_tokens=500, **at),
        "atext": lambda: run(
            litellm.atext_completion(model="gpt-3.5-turbo-instruct", prompt=PROMPT, max_tokens=500, **at)
        ),
        "rerank": lambda: litellm.rerank(
            model="cohere/rerank-v3.5", query="q", documents=["a"], api_base=url, api_key="any"
        ),
        "arerank": lambda: run(
            litellm.arerank(model="cohere/rerank-v3.5", query="q", documents=["a"], api_base=url, api_key="any")
        ),
    }


MEDIA_NANOS = {
    "image": 40_250_000,  # 50 x $5 + 1,000 x $40 per million
    "speech": 15_000_000,  # 1,000 characters x $15 per million
    "transcription": 800_000,  # 100 audio x $6 + 20 x $10 per million
    "text": 2_500_000,  # 1,000 x $1.50 + 500 x $2 per million
    "rerank": 2_000_000,  # one search, $2 per thousand
}


@pytest.mark.parametrize("name", [f"{is_async}{name}" for name in MEDIA_NANOS for is_async in ("", "a")])
def test_images_sound_texts_and_reranking_are_settled(name: str, media: ThreadingHTTPServer, guarded: Guarded) -> None:
    with guarded() as bursar:
        media_calls(media)[name]()
    (record,) = bursar.records()
    plain = name if name in MEDIA_NANOS else name[1:]
    assert (record.estimated, record.cost_nanos) == (False, MEDIA_NANOS[plain])


@pytest.mark.parametrize("name", [f"{is_async}{name}" for name in MEDIA_NANOS for is_async in ("", "a")])
def test_images_sound_texts_and_reranking_are_refused(name: str, media: ThreadingHTTPServer, guarded: Guarded) -> None:
    spent = Budget("cap", "1 requests")
    with guarded(spent) as bursar:
        bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1).settle(
            {"model": "gpt-4o", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        )
        with pytest.raises(BudgetExceeded):
            media_calls(media)[name]()
    assert media.requests == 0  # type: ignore[attr-defined]


def test_a_stream_without_its_last_counts_is_booked_at_the_most_it_may_have(
    media: ThreadingHTTPServer, guarded: Guarded
) -> None:
    """Its beginning tells the input, and one token of output."""
    server = f"http://127.0.0.1:{media.server_address[1]}"
    call = {"model": "anthropic/claude-sonnet-4-5", "api_base": server, "api_key": "any", "max_tokens": 500}
    with guarded() as bursar:
        run(litellm.anthropic_messages(**call, messages=MESSAGES, stream=True))
        read(litellm.completion(**call, messages=MESSAGES, stream=True))
    for record in bursar.records():
        assert record.estimated
        assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (1_000, 500)


def test_moderation_is_free(media: ThreadingHTTPServer, broke: Guarded) -> None:
    url = f"http://127.0.0.1:{media.server_address[1]}/v1"
    with broke() as bursar:
        litellm.moderation(input="hello", model="omni-moderation-latest", api_base=url, api_key="any")
    assert not list(bursar.records())
