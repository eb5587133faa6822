"""Thresholds, switches and detectors through LiteLLM: what is changed is on the wire, what is stopped ends once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import litellm
import pytest
from litellm import completion as early_completion  # before the guard wraps it
from rungs import CHEAPER, HI, RATES

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Operator, Stopped, Threshold
from bursar.detect import Detectors
from bursar.testing import ManualClock
from bursar.testing.clock import START_US
from bursar.testing.provider import Answer, Provider
from bursar_litellm import BudgetStop, BursarLogger, install

BURSAR = [sys.executable, "-c", "from bursar.cli import main; main()"]

Guarded = Callable[..., AbstractContextManager[Bursar]]
Desk = Callable[..., AbstractContextManager[tuple[Bursar, Operator]]]


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Answers of half a cent each, where gpt-4o gives them."""
    with Provider(Answer(input_tokens=400, output_tokens=400), rates=RATES) as running:
        yield running


@pytest.fixture
def desk(guarded: Guarded) -> Desk:
    """desk(*thresholds): an installed guard with one budget of ten cents, and the operator of its store."""

    @contextmanager
    def made(*thresholds: Threshold, limit: str = "0.10 USD") -> Iterator[tuple[Bursar, Operator]]:
        with guarded(Budget("b", limit, thresholds=thresholds)) as bursar:
            yield bursar, Operator(bursar.store, Operator(bursar.store).appoint(), by="ann")

    return made


def gpt(provider: Provider) -> dict[str, Any]:
    return {"model": "openai/gpt-4o", "api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}


def claude(provider: Provider) -> dict[str, Any]:
    return {"model": "anthropic/claude-sonnet-4-6", "api_base": provider.url, "api_key": "any"}


def router(provider: Provider) -> Any:
    """A Router that would try again, and fall back to another model."""
    models = [
        {"model_name": name, "litellm_params": {**gpt(provider), "model": f"openai/{model}"}}
        for name, model in (("main", "gpt-4o"), ("other", "gpt-4o"))
    ]
    return litellm.Router(models, num_retries=2, retry_after=0, disable_cooldowns=True, fallbacks=[{"main": ["other"]}])


CHAT: Any = {"messages": HI, "max_tokens": 500}
TEXT: Any = {"prompt": "hi", "max_tokens": 500}
INPUT: Any = {"input": "hi", "max_output_tokens": 500}
# Every way of calling: an answer, or with stream=True its parts.
WAYS: dict[str, Callable[..., Any]] = {
    "completion": lambda p, **more: litellm.completion(**{**CHAT, **gpt(p), **more}),
    "acompletion": lambda p, **more: litellm.acompletion(**{**CHAT, **gpt(p), **more}),
    "another name of the maximum": lambda p, **more: litellm.completion(
        messages=HI, max_completion_tokens=500, **gpt(p), **more
    ),
    "by position": lambda p, **more: litellm.completion(
        "openai/gpt-4o", HI, max_tokens=500, api_base=f"{p.url}/v1", api_key="any", **more
    ),
    "retried by itself": lambda p, **more: litellm.completion(**{**CHAT, **gpt(p), "num_retries": 2, **more}),
    "anthropic": lambda p, **more: litellm.completion(**{**CHAT, **claude(p), **more}),
    "aanthropic": lambda p, **more: litellm.acompletion(**{**CHAT, **claude(p), **more}),
    "text": lambda p, **more: litellm.text_completion(**{**TEXT, **claude(p), **more}),
    "responses": lambda p, **more: litellm.responses(**{**INPUT, **gpt(p), **more}),
    "aresponses": lambda p, **more: litellm.aresponses(**{**INPUT, **gpt(p), **more}),
    "aresponses by chat": lambda p, **more: litellm.aresponses(**{**INPUT, **claude(p), **more}),
    "amessages": lambda p, **more: litellm.anthropic_messages(**{**CHAT, **claude(p), **more}),
    "Router": lambda p, **more: router(p).completion(**{**CHAT, "model": "main", **more}),
    "aRouter": lambda p, **more: router(p).acompletion(**{**CHAT, "model": "main", **more}),
}


def ask(name: str, provider: Provider, each: Callable[[], None] | None = None, **more: Any) -> None:
    """Call in this way; with `each`, as a stream, and call `each` after every part of it."""
    more |= {} if each is None else {"stream": True}
    answer = WAYS[name](provider, **more)

    async def run() -> None:
        parts = await answer
        if each is not None:
            try:
                async for _ in parts:
                    each()
            finally:
                await asyncio.to_thread(provider.wait_idle)  # the end of the event loop would close what was left open

    if asyncio.iscoroutine(answer):
        asyncio.run(run())
    elif each is not None:
        for _ in answer:
            each()


def call(provider: Provider, **more: Any) -> Any:
    return litellm.completion(**{**CHAT, **gpt(provider), **more})


def settled(guard: Bursar) -> list[Any]:
    return [record for record in guard.records() if record.model and record.outcome != "blocked"]


def is_exact(guard: Bursar, provider: Provider) -> bool:
    """Whether the records are the provider's account, to the nano-dollar, and nothing is held any more."""
    provider.wait_idle()
    booked = [record.cost_nanos for record in settled(guard)]
    return booked == [one.cost_nanos for one in provider.account] and not any(one.reserved for one in guard.status())


# -- what is changed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", WAYS)
def test_the_model_and_the_maximum_that_were_granted_are_on_the_wire(
    name: str, streams: bool, provider: Provider, desk: Desk
) -> None:
    """Also where the caller set a larger maximum; and the record has the model that was asked and the one that answered."""
    steps = Threshold("50%", "downgrade", models=CHEAPER), Threshold("50%", "clamp", max_output_tokens=100)
    with desk(*steps) as (guard, _):
        guard.charge("0.05 USD")
        ask(name, provider, (lambda: None) if streams else None)
        assert is_exact(guard, provider)
        (record,) = settled(guard)
    (served,) = provider.account
    assert (served.model, served.output_tokens) == (CHEAPER[record.model_asked], 100)
    assert (record.model, record.estimated) == (served.model, False)
    assert [action.partition(" ")[0] for action in record.actions] == ["downgrade", "clamp"]


def test_a_maximum_that_nobody_set_is_clamped(provider: Provider, desk: Desk) -> None:
    with desk(Threshold("50%", "clamp", max_output_tokens=50)) as (guard, _):
        guard.charge("0.05 USD")
        call(provider, max_tokens=None)
        assert is_exact(guard, provider)
    assert provider.account[0].output_tokens == 50


CANNOT: dict[str, tuple[Threshold, Callable[[Provider], Any]]] = {
    "a model of another provider": (
        Threshold("50%", "downgrade", models={"gpt-4o": "claude-haiku-4-5"}),
        lambda p: call(p),
    ),
    "a deployment of Azure's": (
        Threshold("50%", "downgrade", models=CHEAPER),
        lambda p: call(p, model="azure/gpt-4o", api_base=p.url, api_version="2024-10-21"),
    ),
    "vectors": (
        Threshold("50%", "downgrade", models=CHEAPER),
        lambda p: litellm.embedding(**{**gpt(p), "model": "openai/text-embedding-3-large"}, input=["hi"]),
    ),
    "a maximum that has to be above the thinking": (
        Threshold("50%", "clamp", max_output_tokens=100),
        lambda p: call(p, **claude(p), thinking={"type": "enabled", "budget_tokens": 1_024}, max_tokens=2_000),
    ),
    "a body that is laid over the call": (
        Threshold("50%", "clamp", max_output_tokens=100),
        lambda p: call(p, extra_body={"max_tokens": 400}),
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_changed_is_asked_for_instead(
    name: str, provider: Provider, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    threshold, send = CANNOT[name]
    caplog.set_level("INFO", "bursar")
    with desk(threshold) as (guard, operator):
        guard.charge("0.05 USD")
        with pytest.raises(ApprovalRequired) as asked:
            send(provider)
        assert provider.requests == 0
        assert asked.value.status_code == 402  # type: ignore[attr-defined]
        assert f"{threshold.action} cannot be carried out here: ask instead (at 50% of b)" in caplog.text
        operator.approve(asked.value.id)
        with suppress(litellm.NotFoundError):  # the provider here has no deployments
            send(provider)
        assert provider.requests == 1
        assert is_exact(guard, provider)


def test_a_call_that_the_cache_may_answer_keeps_its_model(provider: Provider, desk: Desk) -> None:
    """It is reserved for where it goes out, lest an answer that costs nothing be refused."""
    pytest.importorskip("fastapi")  # LiteLLM's cache needs it
    litellm.cache = litellm.Cache(type="local")
    try:
        with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, _):
            call(provider)
            guard.charge("0.05 USD")
            call(provider)
            with pytest.raises(ApprovalRequired):
                call(provider, max_tokens=501)
        assert provider.requests == 1
    finally:
        litellm.cache = None


def test_a_function_that_was_imported_before_the_guard_has_its_maximum_lowered(provider: Provider, desk: Desk) -> None:
    """Its arguments are past: what can be changed is the body."""
    with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, _):
        guard.charge("0.05 USD")
        with pytest.raises(BudgetStop) as stop:
            early_completion(**CHAT, **gpt(provider))
        assert isinstance(stop.value.error, ApprovalRequired)
        assert provider.requests == 0
    with desk(Threshold("50%", "clamp", max_output_tokens=50)) as (guard, _):
        guard.charge("0.05 USD")
        streams = [early_completion(**CHAT, **gpt(provider), stream=True) for _ in range(2)]
        for stream in streams:
            list(stream)
        assert BursarLogger(guard).drain()
        assert len(settled(guard)) == 2  # the same words again are another call
    assert [one.output_tokens for one in provider.account] == [50, 50]


# -- the whole ladder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["completion", "aRouter"])
def test_the_ladder_from_end_to_end(name: str, provider: Provider, tmp_path: Path) -> None:
    """50 % notify, 80 % downgrade, 95 % ask, approved in another process, killed at 100 %: half a cent a call."""
    url, key = f"sqlite:///{tmp_path / 'ladder.db'}?durability=process", tmp_path / "operator.key"
    ladder = [
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models=CHEAPER),
        Threshold("95%", "ask"),
        Threshold("100%", "kill"),
    ]
    # Eight calls of half a cent, one of 0.9 by the cheaper model, and one of 0.15, which it was thought to be less: 5 cents.
    dear = Answer(input_tokens=400, output_tokens=400)
    provider.script([*[dear] * 8, Answer(input_tokens=1_000, output_tokens=14_750), Answer(input_tokens=10_000)])
    more: dict[str, Any] = {"max_tokens": None}
    with Bursar(url, [Budget("month", "0.05 USD", window="month", thresholds=ladder, owner="ann")]) as guard:
        key.write_text(Operator(guard.store).appoint().text)
        uninstall = install(guard)
        try:
            for _ in range(9):
                ask(name, provider, **more)
            assert [one.model for one in provider.account] == ["gpt-4o"] * 8 + ["gpt-4o-mini"]
            for _ in range(2):
                with pytest.raises(ApprovalRequired) as asked:
                    ask(name, provider, **more)
            assert (asked.value.budget, asked.value.status_code) == ("month", 402)  # type: ignore[attr-defined]
            assert provider.requests == 9

            command = [*BURSAR, "approve", asked.value.id, "--store", url, "--key", str(key)]
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            assert told.stdout == f"Approved: {asked.value.id}\n"
            ask(name, provider, **more)  # as soon as it is read that it was approved, which a refusal sees to
            for _ in range(2):
                with pytest.raises(Stopped) as stopped:
                    ask(name, provider, **more)
                assert stopped.value.cause == "killed"
        finally:
            uninstall()
        assert provider.requests == provider.billed_calls == 10
        assert is_exact(guard, provider)
        assert {record.model_asked for record in settled(guard)[8:]} == {"gpt-4o"}
        told_of = [alert.facts["action"] for alert, _ in guard.store.alerts() if alert.kind == "threshold"]
        assert sorted(told_of) == ["ask", "downgrade", "kill", "notify"]


# -- what is stopped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_stream_is_stopped_where_it_is(name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is neither sent again nor sent elsewhere. The guard looks every half a second; here more often."""
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    long = Answer(input_tokens=400, output_tokens=400, chunks=100, event_delay_s=0.02)
    with Provider(long, rates=RATES) as provider, desk() as (guard, operator):
        frozen: list[str] = []

        def freeze() -> None:
            if not frozen:
                frozen.append(operator.freeze({"team": "x"}, why="enough"))

        with guard.scope(team="x"), pytest.raises(Stopped) as stopped:
            ask(name, provider, freeze)
        assert (stopped.value.cause, stopped.value.why) == ("frozen", "enough")
        assert stopped.value.status_code == 402  # type: ignore[attr-defined]
        provider.wait_idle()
        assert provider.requests == 1
        assert provider.account[0].client_gone  # it is not generated to its end
        (record,) = settled(guard)
        assert (record.outcome, record.estimated) == ("failed", True)
        assert record.reason == "stopped in mid-stream (frozen)"
        assert record.cost_nanos >= provider.billed_nanos
        assert guard.status()[0].reserved == 0


@pytest.mark.parametrize("name", ["completion", "aRouter"])
def test_a_budget_that_is_spent_kills_the_streams_in_flight(
    name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    long = Answer(input_tokens=400, output_tokens=400, chunks=100, event_delay_s=0.02)
    with Provider(long, rates=RATES) as provider, desk(Threshold("100%", "kill")) as (guard, _):
        spent: list[object] = []

        def spend() -> None:
            if not spent:
                spent.append(guard.charge("0.10 USD"))

        with pytest.raises(Stopped) as stopped:
            ask(name, provider, spend)
        assert (stopped.value.cause, stopped.value.budget) == ("killed", "b")
        provider.wait_idle()
        assert provider.requests == 1
        assert settled(guard)[0].reason == "stopped in mid-stream (killed)"


@pytest.mark.parametrize("name", ["completion", "acompletion", "aRouter"])
def test_a_call_is_extended_while_it_lasts(name: str, provider: Provider) -> None:
    """I9: it would have expired after ten minutes."""
    clock = ManualClock()
    with Bursar("memory:", [Budget("b", "1 USD")], clock=clock) as guard:
        uninstall = install(guard)

        def wait() -> None:
            clock.advance(250)
            guard.tend()

        try:
            ask(name, provider, wait)
        finally:
            uninstall()
        assert clock.now_us() > START_US + 600_000_000
        assert is_exact(guard, provider)
        (record,) = settled(guard)
        assert not record.estimated


def test_an_operator_stops_an_agent(provider: Provider, desk: Desk) -> None:
    with desk() as (guard, operator), guard.scope(agent="x"):
        operator.freeze({"agent": "x"})
        for name in ("completion", "acompletion", "Router", "aRouter"):
            with pytest.raises(Stopped) as caught:
                ask(name, provider)
            assert caught.value.cause == "frozen"
        with pytest.raises(BudgetStop):
            early_completion(**CHAT, **gpt(provider))
    assert provider.requests == 0


def test_an_agent_that_loops_is_stopped(provider: Provider) -> None:
    """The same tool with the same arguments and the same result, again and again."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather?"}]
    with Bursar("memory:", [Budget("ample", "100 USD")], detectors=Detectors()) as bursar:
        uninstall = install(bursar)
        try:
            with bursar.scope(run="r"), pytest.raises(BudgetExceeded) as caught:
                loop(provider, messages)
        finally:
            uninstall()
    assert isinstance(caught.value, Stopped)
    assert caught.value.cause == "loop"
    assert provider.billed_calls <= 4


def loop(provider: Provider, messages: list[dict[str, Any]]) -> None:
    for number in range(20):
        call(provider, messages=list(messages))
        wish = {"id": f"c{number}", "type": "function", "function": {"name": "search", "arguments": '{"q": "weather"}'}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [wish]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": "no such service"})
