"""Thresholds, switches and detectors through wrapped clients: what is changed is on the wire, what is stopped ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest
from rungs import CHEAPER, HI, RATES

from bursar import ApprovalRequired, Budget, Bursar, Operator, Stopped, Threshold
from bursar.detect import Detectors
from bursar.testing.provider import Answer, Provider

both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=400, output_tokens=400), rates=RATES) as running:
        yield running


@contextmanager
def desk(*thresholds: Threshold, limit: str = "0.10 USD", **said: Any) -> Iterator[tuple[Bursar, Operator]]:
    """A guard with one budget, and the operator of its store."""
    with Bursar("memory:", [Budget("b", limit, thresholds=thresholds)], **said) as guard:
        yield guard, Operator(guard.store, Operator(guard.store).appoint(), by="ann")


def client(guard: Bursar, provider: Provider, kind: str = "OpenAI", *, is_async: bool = False) -> Any:
    sdk, path = (openai, "/v1") if kind == "OpenAI" else (anthropic, "")
    made = getattr(sdk, f"Async{kind}" if is_async else kind)
    return guard.wrap(made(base_url=provider.url + path, api_key="any", max_retries=2))


# How each API is called, and the name of its maximum.
APIS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], Any], str]] = {
    "chat": ("OpenAI", lambda c, said: c.chat.completions.create(messages=HI, **said), "max_completion_tokens"),
    "chat, as of old": ("OpenAI", lambda c, said: c.chat.completions.create(messages=HI, **said), "max_tokens"),
    "responses": ("OpenAI", lambda c, said: c.responses.create(input="hi", **said), "max_output_tokens"),
    "messages": ("Anthropic", lambda c, said: c.messages.create(messages=HI, **said), "max_tokens"),
}


def ask(api: str, guard: Bursar, provider: Provider, is_async: bool, each: Callable[[], None] | None = None) -> None:
    """Call the API; with `each`, as a stream, and call `each` after every part of it."""
    kind, send, limit = APIS[api]
    said = {"model": "claude-sonnet-4-6" if kind == "Anthropic" else "gpt-4o", limit: 500, "stream": each is not None}
    made = client(guard, provider, kind, is_async=is_async)

    async def run() -> None:
        answer = await send(made, said)
        if each is not None:
            async for _ in answer:
                each()
        await made.close()

    if is_async:
        asyncio.run(run())
        return
    answer = send(made, said)
    if each is not None:
        for _ in answer:
            each()


def settled(guard: Bursar) -> list[Any]:
    return [record for record in guard.records() if record.model and record.outcome != "blocked"]


def is_exact(guard: Bursar, provider: Provider) -> bool:
    """Whether the records are the provider's account, to the nano-dollar, and nothing is held any more."""
    provider.wait_idle()
    booked = [record.cost_nanos for record in settled(guard)]
    return booked == [one.cost_nanos for one in provider.account] and not any(one.reserved for one in guard.status())


@both
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("api", APIS)
def test_the_model_and_the_maximum_that_were_granted_are_on_the_wire(
    api: str, streams: bool, is_async: bool, provider: Provider
) -> None:
    """Also where the caller set a larger maximum."""
    steps = Threshold("50%", "downgrade", models=CHEAPER), Threshold("50%", "clamp", max_output_tokens=100)
    with desk(*steps) as (guard, _):
        guard.charge("0.05 USD")
        ask(api, guard, provider, is_async, (lambda: None) if streams else None)
        assert is_exact(guard, provider)
        (record,) = settled(guard)
    (served,) = provider.account
    assert (served.model, served.output_tokens) == (CHEAPER[record.model_asked], 100)
    assert (record.model, record.estimated) == (served.model, False)
    assert [action.partition(" ")[0] for action in record.actions] == ["downgrade", "clamp"]


def test_embeddings_keep_their_model(provider: Provider) -> None:
    """Vectors of another model could not be compared with those that are there."""
    with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, operator):
        guard.charge("0.05 USD")
        embed = client(guard, provider).embeddings.create
        with pytest.raises(ApprovalRequired) as asked:
            embed(model="text-embedding-3-large", input="hi")
        operator.approve(asked.value.id)
        embed(model="text-embedding-3-large", input="hi")
        assert is_exact(guard, provider)
        assert settled(guard)[0].actions == ("downgrade cannot be carried out here: ask instead (at 50% of b)",)


@both
@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_a_stream_is_stopped_where_it_is(api: str, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard looks every half a second; here more often."""
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    long = Answer(input_tokens=400, output_tokens=400, chunks=100, event_delay_s=0.02)
    with Provider(long, rates=RATES) as provider, desk() as (guard, operator):
        frozen: list[str] = []

        def freeze() -> None:
            if not frozen:
                frozen.append(operator.freeze({"team": "x"}, why="enough"))

        with guard.scope(team="x"), pytest.raises(Stopped) as stopped:
            ask(api, guard, provider, is_async, freeze)
        assert (stopped.value.cause, stopped.value.why) == ("frozen", "enough")
        provider.wait_idle()
        assert provider.requests == 1
        assert provider.account[0].client_gone  # it is not generated to its end
        (record,) = settled(guard)
        assert (record.outcome, record.estimated) == ("failed", True)
        assert record.reason == "stopped in mid-stream (frozen)"
        assert record.cost_nanos >= provider.billed_nanos
        assert guard.status()[0].reserved == 0


@both
def test_a_stopped_stream_is_closed_at_once(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose bytes are read, which the SDK leaves open as long as its block lasts."""
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    asked: dict[str, Any] = {"model": "gpt-4o", "messages": HI, "max_completion_tokens": 500, "stream": True}

    async def read(answer: Any) -> None:
        async for _ in answer.iter_bytes():
            continue

    async def run(made: Any, operator: Operator) -> None:
        async with made.chat.completions.with_streaming_response.create(**asked) as answer:
            operator.freeze({})
            with pytest.raises(Stopped):
                await read(answer)
            assert answer.http_response.is_closed
        await made.close()

    long = Answer(input_tokens=400, output_tokens=400, chunks=100, event_delay_s=0.02)
    with Provider(long, rates=RATES) as provider, desk() as (guard, operator):
        made = client(guard, provider, is_async=is_async)
        if is_async:
            asyncio.run(run(made, operator))
            return
        with made.chat.completions.with_streaming_response.create(**asked) as answer:
            operator.freeze({})
            with pytest.raises(Stopped):
                list(answer.iter_bytes())
            assert answer.http_response.is_closed


def test_the_ladder_from_end_to_end(provider: Provider) -> None:
    """50 % notify, 80 % downgrade, 95 % ask, approved, killed at 100 %: half a cent a call, 0.03 by the cheaper model."""
    ladder = [
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models=CHEAPER),
        Threshold("95%", "ask"),
        Threshold("100%", "kill"),
    ]
    with desk(*ladder, limit="0.05 USD") as (guard, operator):
        made = client(guard, provider)

        def call() -> None:
            made.chat.completions.create(model="gpt-4o", messages=HI, max_completion_tokens=500)

        for _ in range(9):
            call()
        assert [one.model for one in provider.account] == ["gpt-4o"] * 8 + ["gpt-4o-mini"]
        guard.charge("0.008 USD")
        with pytest.raises(ApprovalRequired) as asked:
            call()
        operator.approve(asked.value.id)
        call()
        guard.charge("0.002 USD")
        for _ in range(2):
            with pytest.raises(Stopped) as stopped:
                call()
            assert stopped.value.cause == "killed"
        assert provider.requests == 10
        assert is_exact(guard, provider)
        told = [alert.facts["action"] for alert, _ in guard.store.alerts() if alert.kind == "threshold"]
        assert sorted(told) == ["ask", "downgrade", "kill", "notify"]


def test_an_agent_that_loops_is_stopped(provider: Provider) -> None:
    """The same tool, the same arguments, the same result; it has to say which run it is."""
    search = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    provider.script([Answer(tool_calls=[("search", {"query": "weather"})])] * 20)

    def agent(made: openai.OpenAI) -> None:
        messages: list[Any] = list(HI)
        for _ in range(20):
            answer = made.chat.completions.create(model="gpt-4o", messages=messages, tools=[search])
            said: Any = answer.choices[0].message
            result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "no such service"}
            messages += [said.model_dump(exclude_none=True), result]

    with desk(limit="10 USD", detectors=Detectors()) as (guard, _):
        with guard.scope(run="r"), pytest.raises(Stopped) as stopped:
            agent(client(guard, provider))
        assert stopped.value.cause == "loop"
        assert 3 <= provider.requests <= 4
        assert is_exact(guard, provider)
