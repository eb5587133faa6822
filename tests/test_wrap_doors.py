"""No unguarded door: every endpoint of a wrapped client is guarded, free, or refused before anything is sent."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from canned import Canned, CannedProvider

from bursar import Budget, BudgetExceeded, Bursar, InvalidInput, UnboundedEstimate, UsageRecord
from bursar.wrap.doors import path_of, sound_ms
from bursar.wrap.providers import provider_of

MESSAGES: Any = [{"role": "user", "content": "hello"}]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def response(status: str, usage: Any = None) -> dict[str, Any]:
    """A response as OpenAI stores it."""
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-4o", "status": status, "output": [],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage,
    }  # fmt: skip


USED = {"input_tokens": 1_000, "output_tokens": 500, "total_tokens": 1_500}
ROUTES: dict[str, Canned] = {
    "POST /v1/images/generations": Canned({"created": 1, "data": [{"url": "https://a/1"}, {"url": "https://a/2"}]}),
    "POST /v1/images/edits": Canned(
        {"created": 1, "data": [{"b64_json": "AA=="}], "usage": {**USED, "input_tokens_details": {"text_tokens": 1_000}}}
    ),
    "POST /v1/audio/speech": Canned(b"ID3" + bytes(2_000), "audio/mpeg"),
    "POST /v1/audio/transcriptions": Canned({"text": "hi", "usage": {"type": "duration", "seconds": 60}}),
    "POST /v1/audio/translations": Canned({"text": "hi"}),
    "POST /v1/completions": Canned(
        {"id": "c", "object": "text_completion", "created": 1, "model": "gpt-3.5-turbo-instruct",
         "choices": [{"text": "hi", "index": 0, "finish_reason": "stop", "logprobs": None}],
         "usage": {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}}
    ),
    "POST /v1/responses": Canned(response("queued")),
    "GET /v1/responses/resp_1": Canned(response("completed", USED)),
    "POST /v1/moderations": Canned({"id": "m", "model": "omni-moderation-latest", "results": []}),
    "GET /v1/models": Canned({"object": "list", "data": []}),
    "POST /v1/files": Canned({"id": "f", "object": "file", "bytes": 1, "created_at": 1, "filename": "a", "purpose": "batch"}),
    "POST /v1/messages/count_tokens": Canned({"input_tokens": 3}),
}  # fmt: skip


@pytest.fixture
def provider() -> Iterator[CannedProvider]:
    with CannedProvider(ROUTES) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        yield bursar


def plain(provider: CannedProvider) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{provider.url}/v1", api_key="any", max_retries=0)


def only(bursar: Bursar) -> UsageRecord:
    """The one record there is; nothing else is open."""
    (record,) = bursar.records()
    assert bursar.store.open_reservations() == 0
    return record


def sound(seconds: int) -> io.BytesIO:
    """Silence at 16 kHz as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes(bytes(32_000 * seconds))
    file.seek(0)
    file.name = "sound.wav"
    return file


BILLED: dict[str, tuple[Callable[[Any], Any], int]] = {
    "images": (lambda c: c.images.generate(model="dall-e-2", prompt="a cat", n=2), 40_000_000),
    "images by default": (lambda c: c.images.generate(prompt="a cat", n=2), 40_000_000),
    "an edited image": (lambda c: c.images.edit(model="gpt-image-1", image=PNG, prompt="a cat"), 25_000_000),
    "speech": (lambda c: c.audio.speech.create(model="tts-1", voice="alloy", input="abcde" * 20), 1_500_000),
    "a transcription": (lambda c: c.audio.transcriptions.create(model="whisper-1", file=sound(60)), 6_000_000),
    "a completion": (lambda c: c.completions.create(model="gpt-3.5-turbo-instruct", prompt="hi"), 2_500_000),
}


@pytest.mark.parametrize("what", BILLED)
def test_what_is_not_a_chat_is_billed_as_its_provider_bills_it(
    what: str, provider: CannedProvider, bursar: Bursar
) -> None:
    """By the image, the character, the second; at OpenAI's list prices."""
    call, cost_nanos = BILLED[what]
    call(bursar.wrap(plain(provider)))
    record = only(bursar)
    assert (record.cost_nanos, record.estimated) == (cost_nanos, False)


@pytest.mark.parametrize("estimate", ["strict", "learned"])
def test_pictures_that_were_lost_twice_are_booked_twice(estimate: str) -> None:
    """Whoever answers 500 may have drawn and billed them."""
    failing = Canned({"error": {}}, status=500, headers={"retry-after-ms": "1"})
    budgets = [Budget("money", "100 USD", estimate=estimate), Budget("requests", "100 requests", estimate="strict")]
    with CannedProvider({"POST /v1/images/generations": failing}) as provider, Bursar("memory:", budgets) as bursar:
        client = bursar.wrap(openai.OpenAI(base_url=f"{provider.url}/v1", api_key="any", max_retries=1))
        with pytest.raises(openai.InternalServerError):
            client.images.generate(model="dall-e-2", prompt="a cat", n=2)
        assert only(bursar).cost_nanos == 2 * 40_000_000
        money, requests = bursar.status()
        assert (str(money.spent), str(requests.spent), requests.overrun) == ("0.08", "2", 0)
        assert estimate == "learned" or not money.overrun


@pytest.mark.parametrize("what", BILLED)
def test_what_is_not_a_chat_is_refused_by_a_budget(what: str, provider: CannedProvider) -> None:
    with Bursar("memory:", [Budget("tiny", "0.000001 USD")]) as bursar, pytest.raises(BudgetExceeded):
        BILLED[what][0](bursar.wrap(plain(provider)))
    assert provider.requests == []


def test_speech_that_is_read_piece_by_piece_is_billed(provider: CannedProvider, bursar: Bursar) -> None:
    client = bursar.wrap(plain(provider))
    asked = {"model": "tts-1", "voice": "alloy", "input": "abcde" * 20}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        assert len(b"".join(answer.iter_bytes())) == 2_003
    assert only(bursar).cost_nanos == 1_500_000


def test_speech_by_tokens_is_booked_as_estimated(provider: CannedProvider, bursar: Bursar) -> None:
    """Its answer is sound alone: nobody says what it cost."""
    bursar.wrap(plain(provider)).audio.speech.create(model="gpt-4o-mini-tts", voice="alloy", input="abcde" * 20)
    record = only(bursar)
    assert record.estimated
    assert record.cost_nanos > 400 * 12_000


def test_a_transcription_without_its_length_is_booked_by_the_file(provider: CannedProvider, bursar: Bursar) -> None:
    bursar.wrap(plain(provider)).audio.translations.create(model="whisper-1", file=sound(60))
    record = only(bursar)
    assert record.estimated
    assert 6_000_000 <= record.cost_nanos <= 6_001_000  # the header counts as sound


def test_sound_is_bounded_by_its_size() -> None:
    assert sound_ms([("file", ("a.mp3", bytes(1_000), "audio/mpeg"))]) == 2_000
    assert sound_ms([("file", sound(2))]) == 2_002
    assert sound_ms([("file", object())]) == 100 * 2**20 * 2
    assert sound_ms(None) == 0


def test_a_background_response_is_settled_when_it_is_retrieved(provider: CannedProvider, bursar: Bursar) -> None:
    client = bursar.wrap(plain(provider))
    begun = client.responses.create(model="gpt-4o", input="hello", background=True)
    assert bursar.store.open_reservations() == 1
    for _ in range(2):  # to retrieve it again costs nothing
        client.with_options(timeout=5).responses.retrieve(begun.id)
    record = only(bursar)
    assert (record.cost_nanos, record.estimated) == (7_500_000, False)


FREE: dict[str, Callable[[openai.OpenAI], Any]] = {
    "moderation": lambda c: c.moderations.create(input="hello"),
    "models": lambda c: c.models.list(),
    "files": lambda c: c.files.create(file=b"{}", purpose="batch"),
}


def test_retrieving_a_background_response_again_costs_nothing(bursar: Bursar) -> None:
    failed = Canned({"error": {"message": "busy"}}, status=500, headers={"retry-after-ms": "1"})
    answers = [failed, Canned(response("completed", USED))]
    routes = {"POST /v1/responses": Canned(response("queued")), "GET /v1/responses/resp_1": lambda body: answers.pop(0)}
    with CannedProvider(routes) as provider:
        client = bursar.wrap(plain(provider)).with_options(max_retries=1)
        client.responses.create(model="gpt-4o", input="hello", background=True)
        client.responses.retrieve("resp_1")
    assert not answers
    assert (only(bursar).cost_nanos, only(bursar).estimated) == (7_500_000, False)


@pytest.mark.parametrize("what", FREE)
def test_what_is_free_passes(what: str, provider: CannedProvider) -> None:
    with Bursar("memory:", [Budget("none", "0.000000001 USD")]) as bursar:
        FREE[what](bursar.wrap(plain(provider)))
        assert list(bursar.records()) == []
    assert len(provider.requests) == 1


def test_counting_tokens_is_free(provider: CannedProvider) -> None:
    with Bursar("memory:", [Budget("none", "0.000000001 USD")]) as bursar:
        client = bursar.wrap(anthropic.Anthropic(base_url=provider.url, api_key="any"))
        assert client.messages.count_tokens(model="claude-sonnet-4-6", messages=MESSAGES).input_tokens == 3
        assert list(bursar.records()) == []


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a batch": lambda c: c.batches.create(completion_window="24h", endpoint="/v1/responses", input_file_id="f"),
    "training": lambda c: c.fine_tuning.jobs.create(model="gpt-4o", training_file="f"),
    "a film": lambda c: c.videos.create(prompt="a cat"),
    "a vector store": lambda c: c.vector_stores.create(),
    "a container": lambda c: c.containers.create(name="a"),
    "an evaluation": lambda c: c.post("/evals/e/runs", cast_to=object, body={}),
    "an assistant's run": lambda c: c.post("/threads/t/runs", cast_to=object, body={"model": "gpt-4o"}),
    "a realtime secret": lambda c: c.realtime.client_secrets.create(),
    "a realtime session": lambda c: c.realtime.connect(model="gpt-realtime").enter(),
    "responses over a websocket": lambda c: c.responses.connect().enter(),
    "an unknown endpoint": lambda c: c.post("/teleport", cast_to=object, body={"model": "gpt-4o"}),
    "a body that cannot be measured": lambda c: c.post("/embeddings", cast_to=object, content=b"{}"),
    "a transcription without its length": lambda c: c.audio.transcriptions.create(
        model="whisper-1", file=sound(1), response_format="srt"
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nothing_bounds_is_refused(what: str, provider: CannedProvider, bursar: Bursar) -> None:
    """The remedy is named, and nothing is sent."""
    with pytest.raises(UnboundedEstimate) as caught:
        REFUSED[what](bursar.wrap(plain(provider)))
    assert caught.value.reason
    assert "client that is not wrapped" in str(caught.value) or "response_format" in str(caught.value)
    assert provider.requests == []
    assert bursar.store.open_reservations() == 0


def test_a_batch_of_messages_is_refused(provider: CannedProvider, bursar: Bursar) -> None:
    client = bursar.wrap(anthropic.Anthropic(base_url=provider.url, api_key="any"))
    with pytest.raises(UnboundedEstimate):
        client.messages.batches.create(requests=[])
    assert provider.requests == []


def test_middleware_is_refused(provider: CannedProvider, bursar: Bursar) -> None:
    """It may send several requests for one, each of them billed."""
    plain = anthropic.Anthropic(base_url=provider.url, api_key="any")
    client = bursar.wrap(plain).with_options(middleware=[lambda request, call_next: call_next(request)])
    with pytest.raises(UnboundedEstimate):
        client.messages.create(model="claude-sonnet-4-6", max_tokens=10, messages=MESSAGES)
    assert provider.requests == []


def test_a_request_without_a_model_is_refused(provider: CannedProvider, bursar: Bursar) -> None:
    with pytest.raises(InvalidInput):
        bursar.wrap(plain(provider)).responses.create(prompt={"id": "stored"})
    assert provider.requests == []


def test_strict_budgets_refuse_what_has_no_maximum(provider: CannedProvider) -> None:
    """Images by the piece and speech by the character have one."""
    with Bursar("memory:", [Budget("strict", "1 USD", estimate="strict")]) as bursar:
        client = bursar.wrap(plain(provider))
        with pytest.raises(UnboundedEstimate):
            client.images.edit(model="gpt-image-1", image=PNG, prompt="a cat")
        assert provider.requests == []
        client.images.generate(model="dall-e-2", prompt="a cat", n=2)
        client.audio.speech.create(model="tts-1", voice="alloy", input="hello")
        assert len(list(bursar.records())) == 2


@pytest.mark.parametrize("thing", [object(), "client", openai.OpenAI])
def test_only_clients_are_wrapped(thing: object, bursar: Bursar) -> None:
    with pytest.raises(InvalidInput):
        bursar.wrap(thing)


def test_a_client_is_wrapped_once(provider: CannedProvider, bursar: Bursar) -> None:
    with pytest.raises(InvalidInput, match="charged twice"):
        bursar.wrap(bursar.wrap(plain(provider)))


@pytest.mark.parametrize(
    ("kind", "url", "name"),
    [
        (openai.OpenAI, "https://api.openai.com/v1/", "openai"),
        (openai.OpenAI, "https://eu.api.openai.com/v1/", "openai"),
        (openai.OpenAI, "http://127.0.0.1:8000/v1/", "openai"),
        (openai.OpenAI, "https://openrouter.ai/api/v1/", "openrouter"),
        (openai.AsyncOpenAI, "https://api.groq.com/openai/v1/", "groq"),
        (openai.OpenAI, "https://api.deepseek.com", "deepseek"),
        (openai.OpenAI, "https://notapi.deepseek.com.example.org", "openai"),
        (openai.OpenAI, "https://res.openai.azure.com/openai/v1/", "azure"),
        (openai.OpenAI, "https://bedrock-runtime.us-west-2.amazonaws.com/openai/v1", "bedrock"),
        (openai.AsyncAzureOpenAI, "https://gateway.example.com/", "azure"),
        (anthropic.Anthropic, "https://api.anthropic.com", "anthropic"),
        (anthropic.Anthropic, "https://gateway.example.com", "anthropic"),
        (anthropic.AnthropicBedrock, "https://bedrock-runtime.us-east-1.amazonaws.com", "bedrock"),
        (anthropic.AsyncAnthropicVertex, "https://us-east5-aiplatform.googleapis.com/v1", "vertex"),
        (type("Mine", (openai.OpenAI,), {"__module__": "mine"}), "http://localhost", "openai"),
    ],
)
def test_the_provider_is_told_by_class_and_host(kind: type, url: str, name: str) -> None:
    assert provider_of(kind, url) == name


@pytest.mark.parametrize(
    "url",
    [
        "/chat/completions",
        "/v1/chat/completions",
        "/openai/v1/chat/completions",
        "/deployments/mine/chat/completions",
        "/v1/chat/completions?beta=true",
        "https://api.example.com/base/chat/completions",
    ],
)
def test_a_path_is_known_in_every_spelling(url: str) -> None:
    assert path_of(url, "https://api.example.com/base/") == "chat/completions"


def test_openais_data_residency_costs_what_it_adds(bursar: Bursar) -> None:
    """A tenth more from gpt-5.4 on, by OpenAI's price page. The answer does not say it: the client's base URL does."""
    answer = {
        "id": "c", "object": "chat.completion", "created": 1, "model": "gpt-5.4", "choices": [],
        "usage": {"prompt_tokens": 100_000, "completion_tokens": 0, "total_tokens": 100_000},
    }  # fmt: skip
    hosts = ("api.openai.com", "eu.api.openai.com")
    with CannedProvider({f"POST http://{host}/v1/chat/completions": Canned(answer) for host in hosts}) as provider:
        for host in hosts:
            with httpx.Client(proxy=provider.url) as http:
                plain = openai.OpenAI(base_url=f"http://{host}/v1", api_key="any", max_retries=0, http_client=http)
                bursar.wrap(plain).chat.completions.create(model="gpt-5.4", messages=MESSAGES)
    usual, regional = (record.cost_nanos for record in bursar.records())
    assert regional * 10 == usual * 11


def test_what_was_sent_is_what_was_measured(provider: CannedProvider, bursar: Bursar) -> None:
    """`extra_body` wins over the call's own arguments in both."""
    client = bursar.wrap(plain(provider))
    with pytest.raises(BudgetExceeded), bursar.scope(budget="0.001 USD"):
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hi", extra_body={"max_tokens": 100_000})
    client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hi", extra_body={"max_tokens": 500})
    assert json.loads(provider.requests[0][2])["max_tokens"] == 500
