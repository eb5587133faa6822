"""However the answer of a wrapped client is read, it reaches the caller as it was, and its bill reaches the books."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gc
import gzip
import json
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from canned import Canned, CannedProvider
from pydantic import BaseModel, ValidationError

from bursar import Budget, Bursar, Override, PriceBook, UsageRecord
from bursar.commands import Settle
from bursar.testing.provider import Answer, Fault, Provider, Rates, recorded
from bursar.wrap.answer import Answer as PassingAnswer
from bursar.wrap.answer import answer_of
from bursar.wrap.doors import visit

MESSAGES: Any = [{"role": "user", "content": "hello " * 50}]
COST_NANOS = 7_500_000


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=5)) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        yield bursar


def plain(provider: Any, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{provider.url}/v1", api_key="any", max_retries=0, **options)


def only(bursar: Bursar) -> UsageRecord:
    """The one record there is; nothing else is open."""
    (record,) = bursar.records()
    assert bursar.store.open_reservations() == 0
    return record


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": MESSAGES, **more})


class Said(BaseModel):
    """What a parsed answer should be."""

    text: str


def streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="gpt-4o", messages=MESSAGES) as stream:
        stream.until_done()


def responses_streamed(client: openai.OpenAI) -> None:
    with client.responses.stream(model="gpt-4o", input="hello") as stream:
        stream.until_done()


def lines(client: openai.OpenAI) -> None:
    create = client.chat.completions.with_streaming_response.create
    with create(model="gpt-4o", messages=MESSAGES, stream=True) as answer:
        assert sum(line.startswith("data:") for line in answer.iter_lines()) > 5


def read_whole(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(model="gpt-4o", messages=MESSAGES) as answer:
        assert json.loads(answer.read())["usage"]["total_tokens"] == 1_500


def read_in_pieces(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(model="gpt-4o", messages=MESSAGES) as answer:
        assert len(list(answer.iter_bytes(100))) > 5


def parsed_from_raw(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=MESSAGES)
    assert raw.parse().usage.total_tokens == 1_500


def streamed_from_raw(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=MESSAGES, stream=True)
    assert len(list(raw.parse())) > 5


def unparsed(client: openai.OpenAI) -> None:
    """Billed, and then no JSON of the kind that was asked for."""
    with pytest.raises(ValidationError):
        client.chat.completions.parse(model="gpt-4o", messages=MESSAGES, response_format=Said)


WAYS = [
    chat, streamed, responses_streamed, lines, read_whole, read_in_pieces, parsed_from_raw, streamed_from_raw,
    unparsed, lambda client: chat(client.with_options(timeout=20)), lambda client: chat(client.copy()),
    lambda client: client.post("/chat/completions", cast_to=httpx.Response, body={"model": "gpt-4o", "messages": MESSAGES}),
    lambda client: client.with_raw_response.responses.create(model="gpt-4o", input="hello"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_reading_is_billed(
    way: Callable[[openai.OpenAI], Any], provider: Provider, bursar: Bursar
) -> None:
    way(bursar.wrap(plain(provider)))
    record = only(bursar)
    assert (record.cost_nanos, record.estimated) == (COST_NANOS, False)
    assert provider.billed_nanos == COST_NANOS


def test_the_client_keeps_its_class_and_the_given_one_stays_plain(provider: Provider, bursar: Bursar) -> None:
    given = plain(provider, timeout=7, default_headers={"x-mine": "1"})
    chat(given)  # its resources are made
    wrapped = bursar.wrap(given)
    assert isinstance(wrapped, openai.OpenAI)
    assert (wrapped.timeout, wrapped.base_url, wrapped.api_key) == (7, given.base_url, "any")
    assert wrapped.default_headers["x-mine"] == "1"
    chat(given)
    assert list(bursar.records()) == []


def test_the_callers_arguments_stay_as_they_are(provider: Provider, bursar: Bursar) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {}}
    before = copy.deepcopy(asked)
    list(bursar.wrap(plain(provider)).chat.completions.create(model="gpt-4o", **asked))
    assert asked == before


def test_the_caller_sees_the_chunks_that_were_asked_for(provider: Provider, bursar: Bursar) -> None:
    """Usage is switched on for the books; the chunk that tells it is shown to who asked for it."""
    client = bursar.wrap(plain(provider))
    seen = [(len(chunk.choices), chunk.usage is None) for chunk in chat(client, stream=True)]
    expected = [(len(chunk.choices), chunk.usage is None) for chunk in chat(plain(provider), stream=True)]
    assert seen == expected
    asked = chat(client, stream=True, stream_options={"include_usage": True})
    assert [chunk.usage.total_tokens for chunk in asked if not chunk.choices] == [1_500]
    assert {record.cost_nanos for record in bursar.records()} == {COST_NANOS}


def test_a_stream_without_usage_is_booked_as_estimated(provider: Provider, bursar: Bursar) -> None:
    """Whoever switches usage off has it so."""
    list(chat(bursar.wrap(plain(provider)), stream=True, stream_options={"include_usage": False}, max_tokens=600))
    record = only(bursar)
    assert record.estimated
    assert record.cost_nanos >= 600 * 10_000


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (chat, "max_completion_tokens"),
        (lambda client: client.responses.create(model="gpt-4o", input="hello"), "max_output_tokens"),
    ],
    ids=["chat", "responses"],
)
def test_a_smaller_answer_is_asked_for_where_that_fits(
    call: Callable[[openai.OpenAI], Any], name: str, provider: Provider
) -> None:
    """A request without a maximum gets the largest that its budget covers, under the name that its endpoint knows."""
    with Bursar("memory:", [Budget("small", "0.01 USD", estimate="strict")]) as bursar:
        call(bursar.wrap(plain(provider)))
        sent = provider.account[-1].request[name]
        assert 100 < sent < 1_000
        assert only(bursar).cost_nanos == provider.billed_nanos


def test_retries_are_reserved_for(provider: Provider) -> None:
    """A strict budget holds what every attempt may cost."""
    with Bursar("memory:", [Budget("strict", "1 USD", estimate="strict")]) as bursar:
        client = bursar.wrap(plain(provider)).with_options(max_retries=3)
        stream = chat(client, stream=True, max_tokens=100)
        held = bursar.status()[0].reserved
        assert held >= 4 * 100 * 10_000 / 10**9
        list(stream)
        assert bursar.status()[0].reserved == 0


REFUSED, FAILED, BUSY = (Fault("refuse", status=status, retry_after_s=0.001) for status in (429, 500, 529))


@pytest.mark.parametrize("estimate", ["strict", "learned"])
@pytest.mark.parametrize(
    ("faults", "estimated"),
    [
        ([Fault("hang")], True),
        ([FAILED], True),
        ([REFUSED], False),
        ([BUSY], False),
        ([Fault("hang"), REFUSED], True),
        ([FAILED, FAILED], True),
        ([REFUSED, REFUSED], False),
    ],
)
def test_an_attempt_that_the_client_repeats_may_have_been_billed(
    provider: Provider, faults: list[Fault], estimated: bool, estimate: str
) -> None:
    """It is booked at its worst case, whether the last attempt was answered or refused; an attempt that was refused is free."""
    for style in ("sync", "async"):
        provider.script(faults)
        billed = provider.billed_nanos
        with Bursar("memory:", [Budget("all", "100 USD", estimate=estimate)]) as bursar:
            _ask(bursar, provider, style, timeout_s=0.2 if faults[0].kind == "hang" else 30)
            record, billed = only(bursar), provider.billed_nanos - billed
            assert record.estimated == estimated
            assert record.cost_nanos >= billed if estimated else record.cost_nanos == billed
            assert bursar.status()[0].overrun == 0 or estimate == "learned"


LOST = Fault("drop", after_events=0)  # billed, and never answered


@pytest.mark.parametrize("estimates", [("strict", "strict"), ("strict", "learned"), ("learned", "strict")])
@pytest.mark.parametrize("faults", [[LOST], [LOST, LOST], [LOST, REFUSED], [FAILED, LOST]])
def test_an_attempt_that_was_lost_counts_in_every_unit(
    provider: Provider, faults: list[Fault], estimates: tuple[str, str]
) -> None:
    provider.script(faults)
    before, asked = provider.billed_nanos, len(faults) + (len(faults) == 1)
    budgets = [
        Budget("money", "100 USD", estimate=estimates[0]),
        Budget("tokens", "1000000 tokens", estimate=estimates[1]),
        Budget("requests", "100 requests", estimate="strict"),
    ]
    with Bursar("memory:", budgets) as bursar:
        _ask(bursar, provider, "sync", timeout_s=30)
        record, billed = only(bursar), provider.billed_nanos - before
        money, requests, tokens = bursar.status()
        assert record.cost_nanos == int(money.spent * 10**9) >= billed > 0
        if REFUSED not in faults:
            assert requests.spent == asked
        once = record.usage["input_tokens"]
        assert tokens.spent >= once + (faults == [LOST]) * once
        assert not any(one.overrun for one in (tokens, requests)) or estimates[1] == "learned"


def _ask(bursar: Bursar, provider: Provider, style: str, *, timeout_s: float) -> None:
    """One call that is tried twice at most, and may fail all the same."""
    messages = [{"role": "user", "content": "hello " * 1_000}]
    asked: Any = {"model": "gpt-4o", "messages": messages, "max_tokens": 600}
    options: Any = {"base_url": f"{provider.url}/v1", "api_key": "any", "timeout": timeout_s, "max_retries": 1}
    with contextlib.suppress(openai.APIError):
        if style == "sync":
            bursar.wrap(openai.OpenAI(**options)).chat.completions.create(**asked)
        else:
            asyncio.run(bursar.wrap(openai.AsyncOpenAI(**options)).chat.completions.create(**asked))


def test_an_early_close_is_booked_at_once(provider: Provider, bursar: Bursar) -> None:
    stream = chat(bursar.wrap(plain(provider)), stream=True, max_tokens=600)
    next(stream)
    stream.close()
    record = only(bursar)
    assert (record.estimated, record.reason) == (True, "the answer was not read to its end")


def test_a_stream_that_is_never_read_is_booked(provider: Provider, bursar: Bursar) -> None:
    stream = chat(bursar.wrap(plain(provider)), stream=True, max_tokens=600)
    del stream
    gc.collect()
    assert only(bursar).estimated


def test_a_stream_that_was_read_keeps_nothing(provider: Provider, bursar: Bursar) -> None:
    """Neither the answer nor the request waits for a garbage collection."""
    client = bursar.wrap(plain(provider))

    def kept() -> int:
        return sum(isinstance(one, PassingAnswer) for one in gc.get_objects())

    streamed(client)
    gc.collect()
    before = kept()
    gc.disable()
    try:
        streamed(client)
        assert kept() == before
    finally:
        gc.enable()


def test_a_stream_of_a_dead_loop_is_booked(provider: Provider, bursar: Bursar) -> None:
    """Nobody can close it any more."""

    async def leave() -> Any:
        client = bursar.wrap(openai.AsyncOpenAI(base_url=f"{provider.url}/v1", api_key="any"))
        return await client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)

    stream = asyncio.run(leave())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del stream
        gc.collect()
    assert only(bursar).estimated


def test_a_stream_forgotten_in_the_midst_of_the_books_does_not_stop_them(provider: Provider) -> None:
    """A garbage collection may come while a lock of the store is held: the end of the stream is left to another thread."""
    left: list[Any] = []
    threads: list[str] = []
    settled = threading.Event()
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        execute = bursar.store.execute

        def collecting(command: Any) -> Any:
            left.clear()
            gc.collect()
            answer = execute(command)
            if isinstance(command, Settle):
                threads.append(threading.current_thread().name)
                settled.set()
            return answer

        left.append(chat(bursar.wrap(plain(provider)), stream=True))
        bursar.store.execute = collecting  # type: ignore[method-assign]
        bursar.charge("0.001 USD", tool="other")
        assert settled.wait(10)
        assert threads == ["bursar-ending"]
        assert bursar.store.open_reservations() == 0


def test_a_packed_answer_is_read(bursar: Bursar) -> None:
    """What passes by is what the transport has unpacked."""
    events = [
        {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [
            {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]},
        {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [],
         "usage": {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}},
    ]  # fmt: skip
    text = "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events) + "data: [DONE]\r\n\r\n"
    packed = Canned(gzip.compress(text.encode()), "text/event-stream", {"Content-Encoding": "gzip"})
    with CannedProvider({"POST /v1/chat/completions": packed}) as provider:
        chunks = list(chat(bursar.wrap(plain(provider)), stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["hi"]
    assert only(bursar).cost_nanos == COST_NANOS


def frame(event: dict[str, Any]) -> bytes:
    """One frame of an AWS event stream, as Bedrock packs a model's events."""
    payload = json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode()
    headers = b"".join(
        bytes([len(name)]) + name + b"\x07" + struct.pack(">H", len(value)) + value
        for name, value in ((b":event-type", b"chunk"), (b":message-type", b"event"))
    )
    head = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    body = head + struct.pack(">I", zlib.crc32(head)) + headers + payload
    return body + struct.pack(">I", zlib.crc32(body))


def test_the_stream_of_bedrock_is_read(bursar: Bursar) -> None:
    """Its frames are no server-sent events; the client that unpacks them needs the package botocore, the books do not."""
    steps = recorded("anthropic-stream")[0]
    events = [event["data"] for event in steps.events or () if isinstance(event.get("data"), dict)]
    answer = Canned(b"".join(map(frame, events)), "application/vnd.amazon.eventstream")
    with CannedProvider({"POST /v1/messages": answer}) as provider:
        plain = anthropic.Anthropic(base_url=provider.url, api_key="any", max_retries=0)
        create = bursar.wrap(plain).messages.with_streaming_response.create
        with create(**steps.request | {"stream": False}) as raw:
            raw.read()
    record = only(bursar)
    assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (21, 13)
    assert not record.estimated


@pytest.mark.parametrize("name", ["anthropic-messages", "anthropic-stream", "openai-responses-stream", "weather-agent"])
def test_recorded_runs_cost_what_the_provider_billed(name: str) -> None:
    """Real answers, at rates that the test states."""
    steps = recorded(name)
    rates = Rates(input_nanos=3_000, output_nanos=15_000, cache_read_nanos=300, cache_write_5m_nanos=3_750)
    model = str(steps[0].request["model"])
    owner = "anthropic" if "claude" in model else "openai"
    own = Override(
        provider=owner, model=model, input_mtok="3", output_mtok="15", cache_read_mtok="0.3", cache_write_mtok="3.75"
    )
    book = PriceBook.packaged().with_overrides([own])
    with Provider.from_run(steps, rates=rates) as provider, Bursar("memory:", [Budget("b", "9 USD")], prices=book) as b:
        kind: Any = anthropic.Anthropic if owner == "anthropic" else openai.OpenAI
        client = b.wrap(kind(base_url=provider.url, api_key="any", max_retries=0))
        for step in steps:
            is_stream = step.events is not None
            answer = client.post(
                step.endpoint,
                cast_to=object,
                body=dict(step.request),
                stream=is_stream,
                stream_cls=(anthropic.Stream if owner == "anthropic" else openai.Stream)[object],
            )
            list(answer) if is_stream else answer
        provider.wait_idle()
        records = list(b.records())
        assert len(records) == len(steps)
        assert not any(record.estimated for record in records)
        assert sum(record.cost_nanos for record in records) == provider.billed_nanos > 0


def test_a_response_that_streams_in_the_background_waits_to_be_retrieved(bursar: Bursar) -> None:
    """Its stream was left, and the provider goes on: it is settled when the response is retrieved."""
    stored = {
        "id": "resp_7", "object": "response", "created_at": 1, "model": "gpt-4o", "status": "in_progress", "output": [],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    begun = {"type": "response.created", "sequence_number": 0, "response": stored}
    usage = {"input_tokens": 1_000, "output_tokens": 500, "total_tokens": 1_500}
    routes = {
        "POST /v1/responses": Canned(
            f"event: response.created\ndata: {json.dumps(begun)}\n\n".encode(), "text/event-stream"
        ),
        "GET /v1/responses/resp_7": Canned({**stored, "status": "completed", "usage": usage}),
    }
    with CannedProvider(routes) as provider:
        client = bursar.wrap(plain(provider))
        for event in client.responses.create(model="gpt-4o", input="hello", background=True, stream=True):
            assert event.type == "response.created"
        assert bursar.store.open_reservations() == 1
        client.responses.retrieve("resp_7")
    assert only(bursar).cost_nanos == COST_NANOS


@pytest.mark.parametrize("size", [1, 2, 3, 100, 10_000])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
def test_the_events_of_a_stream_are_read_however_their_bytes_come(bursar: Bursar, size: int, end: str) -> None:
    """The usage is read and kept from the caller, who did not ask for it; all else reaches him."""
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    choices = [{"index": 0, "delta": {"content": "hello\n\n"}, "finish_reason": None}]
    usage = {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}
    told = [*[{**chunk, "choices": choices, "usage": None}] * 3, {**chunk, "choices": [], "usage": usage}]
    texts = [json.dumps(one, separators=(",", ":")) for one in told]
    events = [f"data: {text}{end}".encode() for text in [*texts, "[DONE]"]]
    sent, unasked = b"".join(events), b"".join(event for event in events if event != events[3])
    unasked = unasked.replace(b',"usage":null', b"")
    body = {"model": "gpt-4o", "messages": MESSAGES, "stream": True}
    response = httpx.Response(200, headers={"content-type": "text/event-stream"})
    reservation = bursar.reserve("openai", "gpt-4o", body=body)
    passing = answer_of(reservation, visit("chat/completions", "openai", body, None, 0), response)
    shown = b"".join(passing.feed(sent[start : start + size]) for start in range(0, len(sent), size))
    assert shown + passing.finish() == unasked
    assert passing.complete
    passing.end_now()
    assert only(bursar).cost_nanos == COST_NANOS


@pytest.mark.parametrize("told", [("first", "last"), ("first",), ("last",), ()])
def test_what_only_the_first_chunk_says_decides_the_price_too(told: tuple[str, ...]) -> None:
    """Chunks of text are passed over, and the first is read where the last leaves out which model answered, in which tier."""
    facts = {"model": "gpt-4o-2024-08-06", "service_tier": "priority"}
    chunk = {"object": "chat.completion.chunk"}
    first = {**chunk, **(facts if "first" in told else {}), "choices": [{"index": 0, "delta": {"content": "x"}}]}
    usage = {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}
    last = {**chunk, **(facts if "last" in told else {}), "choices": [], "usage": usage}
    response = httpx.Response(200, headers={"content-type": "text/event-stream"})
    body = {"model": "gpt-4o", "messages": MESSAGES, "stream": True}
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        reservation = bursar.reserve("openai", "gpt-4o", body=body)
        passing = answer_of(reservation, visit("chat/completions", "openai", body, None, 0), response)
        for event in (first, first, last):
            passing.feed(f"data: {json.dumps(event)}\n\n".encode())
        passing.end_now()
        booked = only(bursar).usage
    assert {name: booked.get(name) for name in facts} == (facts if told else dict.fromkeys(facts))


@pytest.mark.parametrize("done", [True, False])
def test_counts_of_every_chunk_are_the_bill_where_the_stream_says_that_it_is_done(bursar: Bursar, done: bool) -> None:
    """Perplexity and vLLM tell them as they go on: a stream that is cut is booked at the most it may have."""
    body = {"model": "gpt-4o", "messages": MESSAGES, "stream": True, "max_tokens": 600}
    response = httpx.Response(200, headers={"content-type": "text/event-stream"})
    reservation = bursar.reserve("openai", "gpt-4o", body=body)
    passing = answer_of(reservation, visit("chat/completions", "openai", body, None, 0), response)
    for out in (1, 500):
        usage = {"prompt_tokens": 1_000, "completion_tokens": out, "total_tokens": 1_000 + out}
        choices = [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]
        event = {"object": "chat.completion.chunk", "model": "gpt-4o", "choices": choices, "usage": usage}
        passing.feed(f"data: {json.dumps(event)}\n\n".encode())
    if done:
        passing.feed(b"data: [DONE]\n\n")
    passing.end_now()
    record = only(bursar)
    assert (record.estimated, record.cost_nanos) == ((False, COST_NANOS) if done else (True, COST_NANOS + 1_000_000))
