"""Ways around the gate: what is billed later, what LiteLLM sends although it looks free, and calls that share one id."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import litellm
import pytest
from litellm import video_generation as early_video_generation  # before the guard wraps it

from bursar import Budget, BudgetExceeded, Bursar
from bursar.errors import InvalidInput, UnboundedEstimate
from bursar.testing.provider import Fault, Provider
from bursar_litellm import BudgetStop, LiteLLMBudgetExceeded

PROMPT = "abc " * 1_000
MESSAGES = [{"role": "user", "content": PROMPT}]
COST_NANOS = 7_500_000


Guarded = Callable[..., AbstractContextManager[Bursar]]


def openai(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"model": "openai/gpt-4o", "api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0, **more}


def run(call: Any) -> Any:
    async def awaited() -> Any:
        answer = await call
        return [chunk async for chunk in answer] if hasattr(type(answer), "__anext__") else answer

    return asyncio.run(awaited())


BATCH = {"completion_window": "24h", "endpoint": "/v1/chat/completions", "input_file_id": "f", "api_key": "any"}
RUN = {"custom_llm_provider": "openai", "thread_id": "t", "assistant_id": "a", "api_key": "any"}
EVALUATION = {"eval_id": "e", "data_source": {"type": "completions"}, "custom_llm_provider": "openai", "api_key": "any"}
FILM = {"prompt": "x", "model": "openai/sora-2", "api_key": "any"}
LATER: dict[str, tuple[str, Callable[..., Any]]] = {
    "batch": ("a batch is billed when it has run", lambda **at: litellm.create_batch(**BATCH, **at)),
    "abatch": ("a batch is billed when it has run", lambda **at: run(litellm.acreate_batch(**BATCH, **at))),
    "run": ("a run of an assistant", lambda **at: litellm.run_thread(**RUN, **at)),
    "arun": ("a run of an assistant", lambda **at: run(litellm.arun_thread(**RUN, **at))),
    "arun-stream": ("a run of an assistant", lambda **at: litellm.arun_thread_stream(**RUN, **at)),
    "evaluation": ("an evaluation", lambda **at: litellm.create_run(**EVALUATION, **at)),
    "aevaluation": ("an evaluation", lambda **at: run(litellm.acreate_run(**EVALUATION, **at))),
    "film": ("a film", lambda **at: litellm.video_generation(**FILM, **at)),
    "film, imported early": ("a film", lambda **at: early_video_generation(**FILM, **at)),
    "session": (
        "live session",
        lambda **at: run(litellm._arealtime(model="openai/gpt-4o-realtime-preview", websocket=None, api_key="any")),
    ),
}


@pytest.mark.parametrize("replaced", [False, True], ids=["callbacks-kept", "callbacks-replaced"])
@pytest.mark.parametrize("name", list(LATER))
def test_what_is_billed_later_is_refused_with_a_reason(
    name: str, replaced: bool, provider: Provider, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another library, such as CrewAI, the list of callbacks may be replaced."""
    reason, call = LATER[name]
    with guarded(), monkeypatch.context() as patch:
        if replaced:
            patch.setattr(litellm, "callbacks", [])
        with pytest.raises((UnboundedEstimate, BudgetStop), match=reason):
            call(api_base=f"{provider.url}/v1")
    assert provider.requests == 0


# -- mocks ---------------------------------------------------------------------------------------------------------

COHERE: dict[str, Any] = {"model": "cohere/rerank-v3.5", "query": "q", "documents": ["a"], "api_key": "any"}
CLAUDE: dict[str, Any] = {"model": "anthropic/claude-sonnet-4-5", "messages": MESSAGES, "max_tokens": 5}
SPEECH: dict[str, Any] = {"model": "openai/tts-1", "input": "x", "voice": "alloy", "api_key": "any"}
VECTORS: dict[str, Any] = {"model": "openai/text-embedding-3-small", "input": ["x"], "api_key": "any"}
NO_MOCKS: dict[str, Callable[[str], Any]] = {
    "rerank": lambda url: litellm.rerank(**COHERE, api_base=url, mock_response="x"),
    "arerank": lambda url: run(litellm.arerank(**COHERE, api_base=url, mock_response="x")),
    "speech": lambda url: litellm.speech(**SPEECH, api_base=url, mock_response="x"),
    "responses": lambda url: litellm.responses("x", "gpt-4o", api_key="any", api_base=url, mock_response={"a": 1}),
    "messages": lambda url: run(litellm.anthropic_messages(**CLAUDE, api_key="any", api_base=url, mock_timeout=True)),
    "embedding": lambda url: litellm.embedding(**VECTORS, api_base=url, mock_tool_calls=[1]),
}


@pytest.mark.parametrize("name", list(NO_MOCKS))
def test_a_mock_that_litellm_does_not_know_is_no_free_call(name: str, provider: Provider, broke: Guarded) -> None:
    """It is sent as if the argument were not there."""
    with broke(), pytest.raises(BudgetExceeded):
        NO_MOCKS[name](provider.url)
    assert provider.requests == 0


def test_a_fallback_of_a_mock_is_no_mock(provider: Provider, broke: Guarded) -> None:
    real = {"model": "openai/gpt-4o", "mock_response": None}
    with broke(), pytest.raises(BudgetExceeded):
        litellm.completion(
            **openai(provider), messages=MESSAGES, mock_response="litellm.RateLimitError", fallbacks=[real]
        )
    assert provider.requests == 0


# -- one id ----------------------------------------------------------------------------------------------------------


async def same_id(provider: Provider) -> None:
    call = openai(provider, messages=MESSAGES, max_tokens=500, litellm_call_id="same")
    await asyncio.gather(*(litellm.acompletion(**call) for _ in range(3)))


async def same_id_streamed(provider: Provider) -> None:
    async def one() -> None:
        call = openai(provider, messages=MESSAGES, max_tokens=500, litellm_call_id="same", stream=True)
        async for _ in await litellm.acompletion(**call):
            pass

    await asyncio.gather(one(), one(), one())


async def several_models(provider: Provider) -> None:
    """As the proxy does for `"model": "a,b,c"`."""
    router = litellm.Router([{"model_name": name, "litellm_params": openai(provider)} for name in "abc"])
    await router.abatch_completion(models=list("abc"), messages=MESSAGES, max_tokens=500, litellm_call_id="same")


@pytest.mark.parametrize("at_once", [same_id, same_id_streamed, several_models])
def test_calls_at_once_under_one_id_are_calls_of_their_own(
    at_once: Callable[[Provider], Any], provider: Provider, guarded: Guarded
) -> None:
    with guarded() as bursar:
        asyncio.run(at_once(provider))
    assert [(one.estimated, one.cost_nanos) for one in bursar.records()] == [(False, COST_NANOS)] * 3


def test_a_call_is_not_sent_on_the_reservation_that_another_one_waits_for(provider: Provider, guarded: Guarded) -> None:
    async def both() -> list[Any]:
        call = openai(provider, messages=MESSAGES, max_tokens=500, litellm_call_id="same")
        return await asyncio.gather(*(litellm.acompletion(**call) for _ in range(2)), return_exceptions=True)

    with guarded(Budget("one", "0.009 USD", on_exceed="wait 0.3s")) as bursar:
        taken = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
        answers = asyncio.run(both())
        taken.release("not sent")
    assert [type(answer) for answer in answers] == [LiteLLMBudgetExceeded] * 2
    assert provider.requests == 0


def test_a_list_of_deployments_is_charged_for_those_that_were_asked(provider: Provider, guarded: Guarded) -> None:
    deployments = [{"model_name": "gpt-4o", "litellm_params": openai(provider)}]
    with guarded() as bursar:
        litellm.completion("gpt-4o", MESSAGES, max_tokens=500, model_list=deployments)
    assert [one.cost_nanos for one in bursar.records()] == [COST_NANOS]


# -- the cache -------------------------------------------------------------------------------------------------------


def test_what_the_cache_had_only_in_part_is_billed_for_the_rest(
    provider: Provider, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")  # LiteLLM's cache needs it
    call = openai(provider) | {"model": "openai/text-embedding-3-small"}
    with guarded() as bursar, monkeypatch.context() as patch:
        patch.setattr(litellm, "cache", litellm.Cache(type="local"))
        for texts in (["one"], ["one", "two"], ["one", "two"]):
            run(litellm.aembedding(input=texts, **call))
    assert provider.requests == 2
    assert sorted(one.cost_nanos for one in bursar.records()) == [0, 20_000, 20_000]


# -- what goes over the body -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [{"max_tokens": 4_000}, {"n": 40}, {"max_completion_tokens": 4_000}], ids=str)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_extra_body_asks_for_is_reserved(
    over: dict[str, int], is_async: bool, provider: Provider, guarded: Guarded
) -> None:
    call = openai(provider, messages=MESSAGES, max_tokens=100, extra_body=over)
    with guarded(Budget("cap", "0.03 USD")), pytest.raises(BudgetExceeded):
        run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    assert provider.requests == 0


def test_extra_body_names_no_other_model(provider: Provider, guarded: Guarded) -> None:
    """LiteLLM sends it to some providers, and not to others."""
    with guarded():
        for model in ("gpt-4", "gpt-4o-mini"):
            with pytest.raises(InvalidInput, match="Name it by `model` alone"):
                litellm.completion(**openai(provider), messages=MESSAGES, extra_body={"model": model})
            with pytest.raises(InvalidInput, match="Name it by `model` alone"):
                run(litellm.acompletion(**openai(provider), messages=MESSAGES, extra_body={"model": model}))
    assert provider.requests == 0


# -- answers that LiteLLM cannot read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["malformed", "no_usage"])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_litellm_cannot_read_is_not_free(
    kind: Any, is_async: bool, provider: Provider, guarded: Guarded
) -> None:
    """It makes a 422 of it, as if the provider had refused the request."""
    call: dict[str, Any] = {"model": "gemini/gemini-2.5-flash", "api_base": provider.url, "api_key": "any"}
    call |= {"messages": MESSAGES, "max_tokens": 500}
    provider.script([Fault(kind), Fault("refuse", status=400)])
    with guarded() as bursar:
        for _ in range(2):
            with pytest.raises(litellm.BadRequestError):
                run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    unread, refused = bursar.records()
    assert provider.billed_calls == 1
    assert (unread.estimated, unread.cost_nanos > 0) == (True, True)
    assert (refused.kind, refused.cost_nanos) == ("release", 0)


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_embeddings_are_tried_again_whatever_was_said(is_async: bool, provider: Provider, guarded: Guarded) -> None:
    call = openai(provider) | {"model": "openai/text-embedding-3-small", "input": [PROMPT]}
    provider.script([Fault("drop"), Fault("drop")])
    with guarded():  # what LiteLLM does: no retry was wanted
        run(litellm.aembedding(**call)) if is_async else litellm.embedding(**call)
    assert provider.requests == 3
    with guarded(Budget("one", "0.0001 USD", estimate="strict")), pytest.raises(BudgetExceeded):
        run(litellm.aembedding(**call)) if is_async else litellm.embedding(**call)
    assert provider.requests == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_an_attempt_that_another_one_follows_ends_by_its_own_error(
    is_async: bool, provider: Provider, guarded: Guarded
) -> None:
    """As where a question is too long for a model, and goes to another one in the same call."""
    larger = {"openai/gpt-4o": "openai/gpt-4o-mini"}
    call = openai(provider, messages=MESSAGES, max_tokens=500, context_window_fallback_dict=larger)
    provider.script([Fault("refuse", status=400, message="This model's maximum context length is 10 tokens")])
    with guarded() as bursar:
        run(litellm.acompletion(**call)) if is_async else litellm.completion(**call)
    refused, served = bursar.records()
    assert (refused.kind, refused.cost_nanos) == ("release", 0)
    assert (served.tags["model"], served.estimated) == ("gpt-4o-mini", False)
