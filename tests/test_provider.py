"""The provider's answers as the real clients of OpenAI, Anthropic and Google read them, and its account of them."""

from __future__ import annotations

import asyncio
import http.client
import json
import textwrap
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest

from bursar.errors import InvalidInput
from bursar.testing.provider import Answer, Fault, Provider, Rates

openai = pytest.importorskip("openai")
MESSAGES = [{"role": "user", "content": "x" * 40}]
TOOL = Answer(tool_calls=[("search", {"q": "x"})], input_tokens=20, output_tokens=8)
PARTS = Answer(
    text="A short answer.", input_tokens=1_000, output_tokens=200, cache_read_tokens=600, reasoning_tokens=64
)


def client(provider: Provider, **options: Any) -> Any:
    return openai.OpenAI(base_url=provider.url + "/v1", api_key="any", **({"max_retries": 0} | options))


def claude(provider: Provider) -> Any:
    return pytest.importorskip("anthropic").Anthropic(base_url=provider.url, api_key="any", max_retries=0)


def gemini(provider: Provider) -> Any:
    genai = pytest.importorskip("google.genai")
    return genai.Client(api_key="any", http_options={"base_url": provider.url})


def test_the_example_of_the_package_runs() -> None:
    import bursar.testing.provider as package

    assert package.__doc__
    exec(textwrap.dedent(package.__doc__.partition("\n\n")[2]), {})


def test_chat_states_usage_and_the_account_bills_it() -> None:
    with Provider(PARTS) as provider:
        answer = client(provider).chat.completions.create(model="gpt-4o", messages=MESSAGES)
        assert answer.choices[0].message.content == "A short answer."
        assert answer.choices[0].finish_reason == "stop"
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (1_000, 200, 1_200)
        assert usage.prompt_tokens_details.cached_tokens == 600
        assert usage.completion_tokens_details.reasoning_tokens == 64
        provider.wait_idle()
        (entry,) = provider.account
        assert (entry.endpoint, entry.model, entry.status, entry.billed) == ("openai.chat", "gpt-4o", 200, True)
        assert (entry.id, entry.done, entry.client_gone) == (answer.id, True, False)
        assert entry.request["messages"] == MESSAGES
        # 400 x 2,500 + 600 x 1,250 + 200 x 10,000
        assert entry.cost_nanos == provider.billed_nanos == 3_750_000


def test_chat_tool_calls_plain_and_streamed() -> None:
    with Provider(TOOL) as provider:
        message = client(provider).chat.completions.create(model="gpt-4o", messages=MESSAGES).choices[0].message
        assert message.content is None
        assert json.loads(message.tool_calls[0].function.arguments) == {"q": "x"}
        chunks = list(client(provider).chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert calls[0].function.name == "search"
        assert json.loads("".join(call.function.arguments for call in calls)) == {"q": "x"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("asked", [True, False])
def test_a_chat_stream_states_usage_only_when_asked(asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with Provider(Answer(text="one two three four", chunks=3, input_tokens=7, output_tokens=4)) as provider:
        chunks = list(client(provider).chat.completions.create(model="m", messages=MESSAGES, stream=True, **options))
        text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(text) == "one two three four"
        assert len([piece for piece in text if piece]) == 3
        stated = [chunk.usage for chunk in chunks if chunk.usage]
        assert [(usage.prompt_tokens, usage.completion_tokens) for usage in stated] == ([(7, 4)] if asked else [])
        assert bool(chunks[-1].choices) is not asked
        provider.wait_idle()
        assert provider.billed_nanos == 7 * 2_500 + 4 * 10_000


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_requested_maximum_cuts_the_output_and_n_multiplies_it(name: str) -> None:
    with Provider(Answer(input_tokens=10, output_tokens=500)) as provider:
        answer = client(provider).chat.completions.create(model="m", messages=MESSAGES, n=3, **{name: 20})
        assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
        assert len(answer.choices[0].message.content.split()) == 20
        assert answer.usage.completion_tokens == 60
        assert provider.account[0].output_tokens == 60
        assert provider.billed_nanos == 10 * 2_500 + 60 * 10_000


def test_a_cut_text_is_shorter_and_its_tool_calls_are_gone() -> None:
    with Provider(Answer(text="abcdefgh", tool_calls=[("search", {})], output_tokens=8)) as provider:
        choice = client(provider).chat.completions.create(model="m", messages=MESSAGES, max_tokens=4).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("abcd", None, "length")


def test_tokens_that_are_not_given_are_a_quarter_of_the_characters() -> None:
    with Provider(Answer(text="y" * 41)) as provider:
        client(provider).chat.completions.create(model="m", messages=MESSAGES)  # 40 characters, and "user"
        assert (provider.account[0].input_tokens, provider.account[0].output_tokens) == (11, 11)


def test_responses_plain_and_streamed() -> None:
    with Provider(PARTS) as provider:
        answer = client(provider).responses.create(model="gpt-4o", input="Hello")
        assert (answer.output_text, answer.status) == ("A short answer.", "completed")
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1_000, 200)
        assert answer.usage.input_tokens_details.cached_tokens == 600
        assert answer.usage.output_tokens_details.reasoning_tokens == 64
        with client(provider).responses.stream(model="gpt-4o", input="Hello") as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert (final.output_text, final.usage.output_tokens) == ("A short answer.", 200)
        provider.script([TOOL])
        with client(provider).responses.stream(model="gpt-4o", input="Hello") as stream:
            call = stream.get_final_response().output[0]
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "search", {"q": "x"})
        cut = client(provider).responses.create(model="gpt-4o", input="Hello", max_output_tokens=100)
        assert (cut.status, cut.incomplete_details.reason, cut.usage.output_tokens) == (
            "incomplete",
            "max_output_tokens",
            100,
        )
        provider.wait_idle()
        assert [entry.output_tokens for entry in provider.account] == [200, 200, 8, 100]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(encoding: str) -> None:
    rates = {"text-embedding-3-small": Rates(input_nanos=20, output_nanos=0)}
    with Provider(Answer(input_tokens=9), rates=rates) as provider:
        answer = client(provider).embeddings.create(
            model="text-embedding-3-small", input=["a", "b"], dimensions=4, encoding_format=encoding
        )
        assert len(answer.data) == 2
        assert answer.usage.total_tokens == 9
        if encoding == "float":
            assert answer.data[1].embedding == [0.2, 0.4, 0.6, 0.8]
        assert provider.billed_nanos == 180


def test_a_model_without_rates_is_not_served() -> None:
    with Provider(rates={"gpt-4o": Rates(input_nanos=1, output_nanos=1)}) as provider:
        with pytest.raises(openai.NotFoundError):
            client(provider).chat.completions.create(model="gpt-5", messages=MESSAGES)
        (entry,) = provider.account
        assert (entry.status, entry.billed, entry.cost_nanos, entry.model) == (404, False, 0, "gpt-5")


def test_anthropic_plain_states_cache_parts_outside_the_input() -> None:
    rates = Rates(
        input_nanos=3_000,
        output_nanos=15_000,
        cache_read_nanos=300,
        cache_write_5m_nanos=3_750,
        cache_write_1h_nanos=6_000,
    )
    answer = Answer(
        text="Hi",
        input_tokens=100,
        output_tokens=10,
        cache_read_tokens=40,
        cache_write_5m_tokens=20,
        cache_write_1h_tokens=10,
    )
    with Provider(answer, rates=rates) as provider:
        message = claude(provider).messages.create(model="claude", max_tokens=50, messages=MESSAGES)
        usage = message.usage
        assert (message.content[0].text, message.stop_reason) == ("Hi", "end_turn")
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (30, 40, 30)
        assert usage.cache_creation.ephemeral_1h_input_tokens == 10
        assert provider.billed_nanos == 30 * 3_000 + 40 * 300 + 20 * 3_750 + 10 * 6_000 + 10 * 15_000


def test_anthropic_streamed() -> None:
    with Provider(
        Answer(text="A short answer.", tool_calls=[("search", {"q": "x"})], input_tokens=12, output_tokens=9)
    ) as provider:
        with claude(provider).messages.stream(model="claude", max_tokens=50, messages=MESSAGES) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
        assert kinds[0] == "message_start"
        assert (message.usage.input_tokens, message.usage.output_tokens) == (12, 9)
        assert message.content[0].text == "A short answer."
        assert (message.content[1].name, message.content[1].input, message.stop_reason) == (
            "search",
            {"q": "x"},
            "tool_use",
        )
        cut = claude(provider).messages.create(model="claude", max_tokens=5, messages=MESSAGES)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)


def test_gemini_plain_streamed_and_embedded() -> None:
    with Provider(PARTS) as provider:
        google = gemini(provider)
        answer = google.models.generate_content(model="gemini-x", contents="Hello", config={"candidate_count": 2})
        usage = answer.usage_metadata
        assert answer.text == "A short answer."
        assert (usage.prompt_token_count, usage.candidates_token_count, usage.thoughts_token_count) == (1_000, 272, 128)
        assert (usage.cached_content_token_count, usage.total_token_count) == (600, 1_400)
        chunks = list(google.models.generate_content_stream(model="gemini-x", contents="Hello"))
        assert "".join(chunk.text for chunk in chunks) == "A short answer."
        assert chunks[-1].usage_metadata.candidates_token_count == 136
        provider.script([TOOL])
        call = google.models.generate_content(model="gemini-x", contents="Hello").function_calls[0]
        assert (call.name, call.args) == ("search", {"q": "x"})
        cut = google.models.generate_content(model="gemini-x", contents="Hello", config={"max_output_tokens": 70})
        assert cut.candidates[0].finish_reason == "MAX_TOKENS"
        assert len(google.models.embed_content(model="gemini-embedding-001", contents=["a", "b"]).embeddings) == 2
        provider.wait_idle()
        assert [entry.output_tokens for entry in provider.account] == [400, 200, 8, 70, 0]
        assert {entry.model for entry in provider.account} == {"gemini-x", "gemini-embedding-001"}


def test_gemini_streams_a_json_array_unless_asked_for_events() -> None:
    httpx = pytest.importorskip("httpx")
    with Provider(Answer(text="one two", chunks=2)) as provider:
        url = provider.url + "/v1beta/models/gemini-x:streamGenerateContent"
        parts = httpx.post(url, json={"contents": [{"role": "user", "parts": [{"text": "Hello"}]}]}).json()
        assert "".join(part["candidates"][0]["content"]["parts"][0]["text"] for part in parts) == "one two"


def test_a_script_goes_first_and_in_order() -> None:
    with Provider(Answer(text="last")) as provider:
        provider.script([Answer(text="first"), Answer(text="second", model="other-1")])
        answers = [client(provider).chat.completions.create(model="m", messages=MESSAGES) for _ in range(4)]
        assert [answer.choices[0].message.content for answer in answers] == ["first", "second", "last", "last"]
        assert [answer.model for answer in answers] == ["m", "other-1", "m", "m"]


def test_it_carries_200_threads_at_once() -> None:
    """All 200 are in flight together, each on a connection of its own, and each is billed once."""

    def call(provider: Provider) -> None:
        connection = http.client.HTTPConnection(provider.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "gpt-4o", "messages": MESSAGES}))
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        connection.close()

    answer = Answer(input_tokens=1_000, output_tokens=500)
    with ThreadPoolExecutor(200) as pool:
        with Provider(Fault("hang", answer=answer)) as provider:
            calls = [pool.submit(call, provider) for _ in range(200)]
            provider.wait_requests(200, timeout_s=60)
            assert provider.max_in_flight == 200
        for done in calls:
            done.result()
    assert (provider.billed_calls, provider.billed_nanos) == (200, 200 * 7_500_000)


def test_it_carries_200_asyncio_clients() -> None:
    async def run(provider: Provider) -> None:
        async with openai.AsyncOpenAI(base_url=provider.url + "/v1", api_key="any", max_retries=0) as asyncs:
            calls = [asyncs.chat.completions.create(model="gpt-4o", messages=MESSAGES) for _ in range(200)]
            answers = await asyncio.gather(*calls)
        assert len({answer.id for answer in answers}) == 200

    with Provider(Answer(input_tokens=1_000, output_tokens=500)) as provider:
        asyncio.run(run(provider))
        provider.wait_idle()
        assert provider.billed_nanos == 200 * 7_500_000


def test_rates_are_exact_and_rounded_once() -> None:
    rates = Rates(input_nanos=Fraction(75, 2), output_nanos=150)
    with Provider(Answer(input_tokens=3, output_tokens=1), rates=rates) as provider:
        client(provider).chat.completions.create(model="m", messages=MESSAGES)
        assert provider.billed_nanos == 263  # 112.5 + 150, half up
    with pytest.raises(InvalidInput, match="input_nanos"):
        Rates(input_nanos=0.5, output_nanos=1)  # type: ignore[arg-type]


def test_an_answer_with_parts_above_their_total_is_refused() -> None:
    with pytest.raises(InvalidInput, match="The input holds them"):
        Answer(input_tokens=10, cache_read_tokens=11)
    with pytest.raises(InvalidInput, match="output_tokens"):
        Answer(output_tokens=-1)
