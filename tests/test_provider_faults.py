"""What clients see of the provider's faults, and that a generated answer is billed whether or not it arrives whole."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bursar.errors import InvalidInput
from bursar.testing.provider import Answer, Fault, Provider

httpx = pytest.importorskip("httpx")
CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
ANSWER = Answer(text="one two three four five six", chunks=6, input_tokens=1_000, output_tokens=500)
BILL_NANOS = 7_500_000


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(ANSWER) as running:
        yield running


def post(provider: Provider, *, timeout: float = 20, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    return httpx.post(provider.url + path, json=CHAT | fields, timeout=timeout)


def client(provider: Provider, **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=provider.url + "/v1", api_key="any", **options)


def test_openai_retries_429_after_the_stated_time(provider: Provider) -> None:
    provider.script([Fault("refuse", status=429, retry_after_s=0.25), Fault("refuse", status=500, retry_after_s=0.001)])
    begun = time.monotonic()
    answer = client(provider, max_retries=2).chat.completions.create(**CHAT)
    assert time.monotonic() - begun >= 0.25
    assert answer.usage.completion_tokens == 500
    assert [(entry.status, entry.billed, entry.cost_nanos) for entry in provider.account] == [
        (429, False, 0),
        (500, False, 0),
        (200, True, BILL_NANOS),
    ]
    assert (provider.requests, provider.billed_calls) == (3, 1)


def test_openai_sees_the_refusal_when_retries_are_off(provider: Provider) -> None:
    openai = pytest.importorskip("openai")
    provider.script([Fault("refuse", status=429, retry_after_s=7)])
    with pytest.raises(openai.RateLimitError) as caught:
        client(provider, max_retries=0).chat.completions.create(**CHAT)
    assert caught.value.response.headers["retry-after"] == "7"
    assert provider.billed_nanos == 0


@pytest.mark.parametrize(
    ("path", "fields", "where"),
    [
        ("/v1/chat/completions", {}, ("error", "type")),
        ("/v1/messages", {"max_tokens": 5}, ("error", "type")),
        ("/v1beta/models/gemini-x:generateContent", {"contents": [{"parts": [{"text": "Hi"}]}]}, ("error", "status")),
    ],
)
def test_a_refusal_speaks_the_format_of_its_endpoint(
    provider: Provider, path: str, fields: Any, where: tuple[str, str]
) -> None:
    provider.script([Fault("refuse", status=429)])
    answer = post(provider, path=path, **fields)
    assert answer.status_code == 429
    assert "retry-after" not in answer.headers
    assert answer.json()[where[0]][where[1]] in ("rate_limit_error", "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("stream", [False, True])
def test_a_drop_is_billed_in_full(provider: Provider, stream: bool) -> None:
    provider.script([Fault("drop", after_events=3)])
    with pytest.raises(httpx.RemoteProtocolError):
        post(provider, stream=stream)
    provider.wait_idle()
    (entry,) = provider.account
    assert (entry.fault, entry.billed, entry.cost_nanos, entry.client_gone) == ("drop", True, BILL_NANOS, False)
    assert entry.events_sent == (3 if stream else 0)


def test_a_dropped_stream_gives_what_was_sent_before(provider: Provider) -> None:
    provider.script([Fault("drop", after_events=3)])
    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", provider.url + "/v1/chat/completions", json=CHAT | {"stream": True}) as answer,
    ):
        lines.extend(line for line in answer.iter_lines() if line)
    assert len(lines) == 3
    assert all(json.loads(line.removeprefix("data: ")) for line in lines)


def test_a_drop_before_the_status_and_before_generation_is_not_billed(provider: Provider) -> None:
    provider.script([Fault("drop", after_events=0, billed=False)])
    with pytest.raises(httpx.RemoteProtocolError, match="disconnected"):
        post(provider)
    (entry,) = provider.account
    assert (entry.billed, entry.cost_nanos, entry.output_tokens) == (False, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_events", [None, 2])
def test_a_hang_ends_when_the_client_goes(provider: Provider, stream: bool, after_events: int | None) -> None:
    provider.script([Fault("hang", after_events=after_events)])
    with pytest.raises(httpx.ReadTimeout):
        post(provider, stream=stream, timeout=0.5)
    provider.wait_idle()
    (entry,) = provider.account
    assert (entry.billed, entry.cost_nanos, entry.client_gone, entry.done) == (True, BILL_NANOS, True, True)
    assert entry.events_sent == (2 if stream and after_events else 0)


def test_a_hang_ends_when_the_provider_stops() -> None:
    before = threading.active_count()
    with socket.socket() as other:
        with Provider(Fault("hang")) as provider:
            host, port = provider.url.removeprefix("http://").split(":")
            other.connect((host, int(port)))
            body = json.dumps(CHAT).encode()
            other.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            provider.wait_requests(1)
        assert other.recv(1) == b""
    assert provider.account[0].client_gone is False
    assert threading.active_count() == before


def test_a_client_that_times_out_is_billed() -> None:
    with Provider(ANSWER, latency_s=30) as provider:
        with pytest.raises(httpx.ReadTimeout):
            post(provider, timeout=0.5)
        provider.wait_idle()  # well before the 30 s: the provider saw the client go
        assert provider.account[0].client_gone
        assert provider.billed_nanos == BILL_NANOS


def test_an_abandoned_stream_is_billed_in_full() -> None:
    with Provider(Answer(chunks=50, event_delay_s=0.05, input_tokens=1_000, output_tokens=500)) as provider:
        with client(provider).chat.completions.create(**CHAT, stream=True) as stream:
            for _, _chunk in zip(range(3), stream, strict=False):
                pass
        provider.wait_idle()
        (entry,) = provider.account
        assert entry.client_gone
        assert entry.events_sent < 52
        assert provider.billed_nanos == BILL_NANOS


@pytest.mark.parametrize("stream", [False, True])
def test_malformed_json(provider: Provider, stream: bool) -> None:
    provider.script([Fault("malformed")])
    answer = post(provider, stream=stream)
    assert answer.status_code == 200
    payloads = [line.removeprefix("data: ") for line in answer.text.splitlines() if line] if stream else [answer.text]
    broken = []
    for index, payload in enumerate(payloads):
        try:
            json.loads(payload)
        except ValueError:
            broken.append(index)
    assert broken == ([1, len(payloads) - 1] if stream else [0])  # the last of a stream is [DONE]
    assert provider.billed_nanos == BILL_NANOS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {"max_tokens": 5_000}),
        ("/v1beta/models/gemini-x:generateContent", {"contents": [{"parts": [{"text": "Hi"}]}]}),
        ("/v1beta/models/gemini-x:streamGenerateContent?alt=sse", {"contents": [{"parts": [{"text": "Hi"}]}]}),
    ],
)
def test_an_answer_without_usage_is_whole_and_billed(provider: Provider, path: str, fields: Any, stream: bool) -> None:
    stated = re.compile(r'"(output_tokens|completion_tokens|candidatesTokenCount)":500')
    named = re.compile(r'"(output_tokens|completion_tokens|candidatesTokenCount)"')
    answer = Answer(text="one piece", chunks=1, input_tokens=1_000, output_tokens=500)
    provider.script([answer, Fault("no_usage", answer=answer)])
    assert stated.search(post(provider, path=path, stream=stream, **fields).text)
    bare = post(provider, path=path, stream=stream, **fields).text
    assert not named.search(bare)
    assert "one piece" in bare
    assert provider.billed_nanos == 2 * BILL_NANOS


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model":"m"}', 400),
        ("/v1/chat/completions", b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":0}', 400),
        ("/v1/messages", b'{"model":"m","messages":[{"role":"user","content":"x"}]}', 400),  # no max_tokens
        ("/v1/nothing", b"{}", 404),
    ],
)
def test_a_request_that_no_provider_accepts_is_not_billed(
    provider: Provider, path: str, body: bytes, status: int
) -> None:
    answer = httpx.post(provider.url + path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert [(entry.status, entry.billed) for entry in provider.account] == [(status, False)]


def test_what_goes_wrong_inside_the_provider_is_raised_when_it_stops() -> None:
    provider = Provider(Answer(tool_calls=[("search", {"q": object()})]))
    with pytest.raises(httpx.RemoteProtocolError):
        post(provider)
    with pytest.raises(TypeError, match="serializable"):
        provider.stop()


def test_one_connection_carries_many_requests(provider: Provider) -> None:
    with httpx.Client(limits=httpx.Limits(max_connections=1)) as one:
        ports = set()
        for _ in range(20):
            answer = one.post(provider.url + "/v1/chat/completions", json=CHAT | {"stream": True})
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1
    assert provider.billed_calls == 20


def test_headers_of_the_answer_and_its_latency() -> None:
    with Provider(Answer(headers={"x-ratelimit-remaining-requests": "3"}, latency_s=0.1), latency_s=30) as provider:
        begun = time.monotonic()
        assert post(provider).headers["x-ratelimit-remaining-requests"] == "3"
        assert 0.1 <= time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "explode"},
        {"kind": "refuse", "status": 200},
        {"kind": "drop", "after_events": -1},
        {"kind": "refuse", "retry_after_s": -1},
    ],
)
def test_a_fault_that_cannot_be_is_refused(fields: Any) -> None:
    with pytest.raises(InvalidInput):
        Fault(**fields)
