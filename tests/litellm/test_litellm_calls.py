"""What LiteLLM makes of a guarded call: early imports, callbacks, fallbacks, retries, caches, and what the program sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import litellm
import pytest
from litellm import acompletion as early_acompletion  # before the guard wraps them
from litellm import completion as early_completion
from litellm.integrations.custom_logger import CustomLogger

from bursar import Budget, BudgetExceeded, Bursar
from bursar.errors import InvalidInput, StoreError, UnknownPrice
from bursar.testing.provider import Answer, Fault, Provider
from bursar_litellm import BudgetStop, BursarLogger, LiteLLMBudgetExceeded, install

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


def test_an_unknown_price_is_refused(provider: Provider, guarded: Guarded) -> None:
    """I11; and no retry of the Router takes it up."""
    unknown = openai(provider) | {"model": "openai/nobody-knows"}
    router = litellm.Router([{"model_name": "main", "litellm_params": unknown}], num_retries=2)
    with guarded():
        with pytest.raises(UnknownPrice):
            litellm.completion(**unknown, messages=MESSAGES)
        with pytest.raises(UnknownPrice):
            run(router.acompletion(model="main", messages=MESSAGES))
    assert provider.requests == 0


def test_arguments_by_position_are_held_too(provider: Provider, guarded: Guarded) -> None:
    """LiteLLM's hooks get named arguments only."""
    at = {"api_base": f"{provider.url}/v1", "api_key": "any"}
    with guarded() as bursar:
        run(litellm.acompletion("openai/gpt-4o", MESSAGES, max_tokens=500, max_retries=0, **at))
        run(litellm.aresponses(PROMPT, "openai/gpt-4o", max_output_tokens=500, **at))
        run(litellm.aembedding("openai/text-embedding-3-small", [PROMPT], **at))
        run(early_acompletion("openai/gpt-4o", MESSAGES, max_tokens=500, max_retries=0, **at))
    costs = [COST_NANOS, COST_NANOS, 20_000, COST_NANOS]
    assert [(one.estimated, one.cost_nanos) for one in bursar.records()] == [(False, cost) for cost in costs]


def test_an_alias_is_held_as_the_model_that_it_stands_for(
    provider: Provider, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "model_alias_map", {"fast": "openai/gpt-4o"})
    with guarded() as bursar:
        litellm.completion(**openai(provider) | {"model": "fast"}, messages=MESSAGES, max_tokens=500)
    (record,) = bursar.records()
    assert (record.model, record.estimated, record.cost_nanos) == ("gpt-4o", False, COST_NANOS)


def test_a_name_that_litellm_refuses_is_its_own_error(provider: Provider, guarded: Guarded) -> None:
    with guarded() as bursar:
        with pytest.raises(litellm.BadRequestError):
            litellm.completion(**openai(provider) | {"model": "nobody-sells-it", "api_base": None}, messages=MESSAGES)
        assert not list(bursar.records())
    assert provider.requests == 0


# -- functions that were imported before the guard ---------------------------------------------------------------


def test_an_early_import_cannot_pass_the_gate(provider: Provider, broke: Guarded) -> None:
    """Sync code meets an error that no `except Exception` of LiteLLM swallows; awaited code the usual one."""
    call = openai(provider, messages=MESSAGES, max_tokens=500)
    with broke() as bursar:
        with pytest.raises(BudgetStop) as caught:
            early_completion(**call)
        assert isinstance(caught.value.error, BudgetExceeded)
        with pytest.raises(LiteLLMBudgetExceeded):
            run(early_acompletion(**call))
    assert provider.requests == 0
    assert [record.outcome for record in bursar.records()] == ["blocked"] * 2


def test_an_early_import_is_settled_by_litellms_events(provider: Provider, guarded: Guarded) -> None:
    call = openai(provider, messages=MESSAGES, max_tokens=500)

    async def streamed() -> None:
        async for _ in await early_acompletion(**call, stream=True):
            pass
        while bursar.store.open_reservations():  # LiteLLM tells of a stream's end in a task of its own
            await asyncio.sleep(0)

    with guarded() as bursar:
        early_completion(**call)
        assert BursarLogger(bursar).drain()
        read(early_completion(**call, stream=True))
        assert BursarLogger(bursar).drain()
        run(early_acompletion(**call))
        asyncio.run(streamed())
    assert [(one.estimated, one.cost_nanos) for one in bursar.records()] == [(False, COST_NANOS)] * 4


def test_a_logger_among_the_callbacks_is_enough(provider: Provider) -> None:
    with Bursar("memory:", [Budget("cap", "0.000001 USD")]) as bursar:
        logger = BursarLogger(bursar)
        litellm.callbacks.append(logger)
        try:
            for stream in (False, True):
                with pytest.raises(BudgetExceeded):
                    litellm.completion(**openai(provider), messages=MESSAGES, stream=stream)
                with pytest.raises(BudgetExceeded):
                    run(litellm.acompletion(**openai(provider), messages=MESSAGES, stream=stream))
        finally:
            for name in ("callbacks", "input_callback", "success_callback", "failure_callback"):
                if logger in getattr(litellm, name):
                    getattr(litellm, name).remove(logger)
    assert provider.requests == 0


def test_libraries_that_replace_the_callbacks_cannot_switch_it_off(provider: Provider, broke: Guarded) -> None:
    """CrewAI sets litellm.callbacks at every call."""
    with broke():
        before, litellm.callbacks = litellm.callbacks, []
        try:
            with pytest.raises(BudgetExceeded):
                litellm.completion(**openai(provider), messages=MESSAGES)
            with pytest.raises(BudgetExceeded):
                run(litellm.acompletion(**openai(provider), messages=MESSAGES))
        finally:
            litellm.callbacks = before
    assert provider.requests == 0


def test_two_loggers_of_one_guard_count_once(provider: Provider, guarded: Guarded) -> None:
    with guarded() as bursar:
        uninstall = install(bursar, team="again")
        litellm.completion(**openai(provider), messages=MESSAGES, max_tokens=500)
        run(litellm.acompletion(**openai(provider), messages=MESSAGES, max_tokens=500))
        uninstall()
        with Bursar("memory:") as other, pytest.raises(InvalidInput, match="Uninstall it first"):
            install(other)
    assert [record.cost_nanos for record in bursar.records()] == [COST_NANOS] * 2


def test_uninstalled_it_does_nothing(provider: Provider) -> None:
    with Bursar("memory:", [Budget("cap", "0.000001 USD")]) as bursar:
        install(bursar)()
        litellm.completion(**openai(provider), messages=MESSAGES)
        run(litellm.acompletion(**openai(provider), messages=MESSAGES))
        assert provider.requests == 2
        assert not list(bursar.records())


# -- fallbacks, retries, caches ----------------------------------------------------------------------------------


def small_and_main(provider: Provider, **more: Any) -> Any:
    models = [
        {"model_name": name, "litellm_params": openai(provider) | {"model": f"openai/{model}"}}
        for name, model in (("main", "gpt-4o"), ("small", "gpt-4o-mini"))
    ]
    return litellm.Router(models, disable_cooldowns=True, retry_after=0, **more)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_refused_model_is_not_retried_and_its_fallback_may_fit(
    is_async: bool, provider: Provider, guarded: Guarded
) -> None:
    router = small_and_main(provider, num_retries=3, fallbacks=[{"main": ["small"]}])
    call = {"model": "main", "messages": MESSAGES, "max_tokens": 500}
    with guarded(Budget("dear", "0.000001 USD", match={"model": "gpt-4o"})) as bursar:
        run(router.acompletion(**call)) if is_async else router.completion(**call)
    refused, served = bursar.records()
    assert (refused.outcome, refused.tags["model"]) == ("blocked", "gpt-4o")
    assert (served.outcome, served.tags["model"], served.estimated) == ("completed", "gpt-4o-mini", False)
    assert [one.model for one in provider.account] == ["gpt-4o-mini"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failed_model_and_its_fallback_are_two_calls(is_async: bool, provider: Provider, guarded: Guarded) -> None:
    provider.script([Fault("refuse", status=429)])
    call = openai(provider, messages=MESSAGES, max_tokens=500, fallbacks=["openai/gpt-4o-mini"])
    with guarded() as bursar:
        run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    failed, served = bursar.records()
    assert (failed.kind, failed.cost_nanos) == ("release", 0)
    assert (served.tags["model"], served.cost_nanos, served.estimated) == ("gpt-4o-mini", 450_000, False)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_refusal_comes_out_of_fallbacks_as_itself(is_async: bool, provider: Provider, broke: Guarded) -> None:
    call = openai(provider, messages=MESSAGES, max_tokens=500, fallbacks=["openai/gpt-4o-mini"])
    with broke() as bursar, pytest.raises(BudgetExceeded) as caught:
        run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    assert caught.value.budget == "cap"
    assert provider.requests == 0
    assert [record.tags["model"] for record in bursar.records()] == ["gpt-4o", "gpt-4o-mini"]


def test_the_routers_retries_are_calls_of_their_own(provider: Provider, guarded: Guarded) -> None:
    provider.script([Fault("refuse", status=500), Fault("refuse", status=429)])
    with guarded() as bursar:
        run(small_and_main(provider, num_retries=2).acompletion(model="main", messages=MESSAGES, max_tokens=500))
    unknown, refused, served = bursar.records()
    assert (unknown.estimated, unknown.cost_nanos > 0) == (True, True)
    assert refused.kind == "release"
    assert (served.estimated, served.cost_nanos) == (False, COST_NANOS)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_from_the_cache_costs_nothing(is_async: bool, provider: Provider, guarded: Guarded) -> None:
    pytest.importorskip("fastapi")  # LiteLLM's cache needs it
    litellm.cache = litellm.Cache(type="local")
    call = openai(provider, messages=MESSAGES, max_tokens=500)
    try:
        with guarded() as bursar:
            for _ in range(2):
                run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    finally:
        litellm.cache = None
    assert provider.requests == 1
    assert sum(record.cost_nanos for record in bursar.records()) == COST_NANOS


def test_a_mocked_answer_costs_nothing(provider: Provider, broke: Guarded) -> None:
    with broke() as bursar:
        litellm.completion(**openai(provider), messages=MESSAGES, mock_response="hello")
        run(litellm.acompletion(**openai(provider), messages=MESSAGES, mock_response="hello"))
    assert provider.requests == 0
    assert not list(bursar.records())


def test_an_answer_that_fails_its_schema_is_billed_all_the_same(provider: Provider, guarded: Guarded) -> None:
    provider.script([Answer(text="not json", input_tokens=1_000, output_tokens=500)])
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with guarded() as bursar, pytest.raises(litellm.JSONSchemaValidationError):
        litellm.completion(
            **openai(provider), messages=MESSAGES, response_format=form, enable_json_schema_validation=True
        )
    (record,) = bursar.records()
    assert (record.outcome, record.estimated, record.cost_nanos) == ("failed", False, COST_NANOS)


def test_a_connection_that_was_never_made_costs_nothing(guarded: Guarded) -> None:
    with guarded() as bursar, pytest.raises(litellm.InternalServerError):
        litellm.completion("openai/gpt-4o", MESSAGES, api_base="http://127.0.0.1:9/v1", api_key="any", max_retries=0)
    (record,) = bursar.records()
    assert (record.kind, record.cost_nanos) == ("release", 0)


# -- what the user's program sees --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["call", "acall", "stream", "astream"])
def test_an_answer_is_made_to_fit_where_no_maximum_was_set(style: str, provider: Provider, guarded: Guarded) -> None:
    """What is left admits a smaller answer: its maximum is on the wire, and the budget holds."""
    call = openai(provider, messages=[{"role": "user", "content": "hi"}])
    provider.script([Answer(output_tokens=1_000)])  # as many as the request lets it
    with guarded(Budget("cap", "0.002 USD")) as bursar:
        if style.startswith("a"):
            run(litellm.acompletion(**call, stream=style == "astream"))
        else:
            read(litellm.completion(**call, stream=style == "stream"))
    (status,) = bursar.status()
    assert (status.overrun, status.spent > 0) == (0, True)
    (billed,) = provider.account
    limit = billed.request.get("max_tokens") or billed.request.get("max_completion_tokens")
    assert isinstance(limit, int)
    assert 16 <= limit <= 200
    assert billed.output_tokens == limit


@pytest.mark.parametrize("is_async", [False, True])
def test_usage_is_switched_on_and_not_shown(is_async: bool, provider: Provider, guarded: Guarded) -> None:
    call = openai(provider, messages=MESSAGES, max_tokens=500)
    unguarded = (
        run(litellm.acompletion(**call, stream=True)) if is_async else read(litellm.completion(**call, stream=True))
    )
    with guarded():
        stream = (
            run(litellm.acompletion(**call, stream=True)) if is_async else read(litellm.completion(**call, stream=True))
        )
    assert [one.request.get("stream_options") for one in provider.account] == [None, {"include_usage": True}]
    assert len(stream) == len(unguarded)
    assert [getattr(chunk, "usage", None) for chunk in stream] == [None] * len(stream)


def test_streams_keep_their_kind(provider: Provider, guarded: Guarded) -> None:
    with guarded() as bursar:
        stream = litellm.completion(**openai(provider), messages=MESSAGES, max_tokens=500, stream=True)
        assert isinstance(stream, litellm.CustomStreamWrapper)
        answer = litellm.stream_chunk_builder(list(stream))
        assert answer.choices[0].message.content
    assert [record.cost_nanos for record in bursar.records()] == [COST_NANOS]


def test_who_asks_is_told_by_scope_metadata_and_arguments(provider: Provider, guarded: Guarded) -> None:
    said = {"bursar": {"agent": "planner", "team": "by-metadata"}, "session_id": "s-1", "tags": ["night"]}
    with guarded() as bursar, bursar.scope(team="by-scope"):
        for call in (litellm.completion, lambda **more: run(litellm.acompletion(**more))):
            call(**openai(provider), messages=MESSAGES, max_tokens=500, user="customer-7", metadata=said)
    records = list(bursar.records())
    assert len(records) == 2
    for record in records:
        tags = {name: record.tags[name] for name in ("agent", "team", "run", "customer", "tag.night", "connection")}
        assert tags == {
            "agent": "planner",
            "team": "by-scope",
            "run": "s-1",
            "customer": "customer-7",
            "tag.night": "yes",
            "connection": "openai",
        }


@pytest.mark.parametrize("is_async", [False, True])
def test_a_store_out_of_reach_sends_nothing(is_async: bool, provider: Provider) -> None:
    """I12."""
    call = openai(provider, messages=MESSAGES, max_tokens=500)
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        uninstall = install(bursar)
        bursar.store.close()
        try:
            with pytest.raises(StoreError):
                run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
        finally:
            uninstall()
    assert provider.requests == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_defect_of_ours_sends_nothing(
    is_async: bool, provider: Provider, monkeypatch: pytest.MonkeyPatch, guarded: Guarded
) -> None:
    """I12: whatever goes wrong before the call, LiteLLM does not send it."""
    call = openai(provider, messages=MESSAGES, max_tokens=500)
    with guarded():
        monkeypatch.setattr("bursar_litellm.logger.read_tags", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    assert provider.requests == 0


def test_a_failing_settlement_does_not_cost_the_answer(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    class Closing(CustomLogger):
        def log_post_api_call(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
            bursar.store.close()

    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        uninstall = install(bursar)
        litellm.callbacks.append(Closing())
        try:
            answer = litellm.completion(**openai(provider), messages=MESSAGES, max_tokens=500)
        finally:
            litellm.callbacks.pop()
            litellm.input_callback.clear()
            uninstall()
    assert answer.choices[0].message.content
    assert "while ending a call" in caplog.text


def test_an_abandoned_stream_that_was_complete_is_booked_exactly(provider: Provider, guarded: Guarded) -> None:
    """Many programs stop reading when the finish reason has come: where the usage came with it, nothing is estimated."""
    with guarded() as bursar:
        for chunk in litellm.completion(**claude(provider), messages=MESSAGES, max_tokens=500, stream=True):
            if chunk.choices[0].finish_reason:
                break
        del chunk
    (record,) = bursar.records()
    assert (record.estimated, record.cost_nanos) == (False, CLAUDE_NANOS)


@pytest.mark.parametrize("is_early", [False, True])
def test_a_stream_that_breaks_off_is_billed_whatever_status_litellm_gives_it(
    is_early: bool, provider: Provider, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has begun was accepted: an error in the middle of it frees nothing, whoever tells of it first."""

    def cut(*_: Any, **__: Any) -> None:
        raise litellm.BadRequestError("in the middle", "gpt-4o", "openai")

    with guarded() as bursar:
        completion = early_completion if is_early else litellm.completion
        stream = completion(**openai(provider), messages=MESSAGES, max_tokens=500, stream=True)
        next(stream)
        monkeypatch.setattr(litellm.CustomStreamWrapper, "chunk_creator", cut)
        with pytest.raises(litellm.BadRequestError):
            next(stream)
        assert BursarLogger(bursar).drain()
    (record,) = bursar.records()
    assert (record.outcome, record.estimated, record.cost_nanos > 0) == ("failed", True, True)
