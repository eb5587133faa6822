"""Two doors of one guard: a wrapped client inside of LiteLLM is charged by LiteLLM alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import litellm
import openai
import pytest
from litellm.litellm_core_utils.thread_pool_executor import executor

from bursar import Bursar
from bursar.testing.provider import Fault, Provider

QUESTION = [{"role": "user", "content": "Why?"}]
ASKED = {"model": "openai/gpt-4o", "messages": QUESTION, "max_tokens": 500}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_wrapped_client_inside_of_litellm(
    stream: bool, provider: Provider, guarded: Callable[[], AbstractContextManager[Bursar]]
) -> None:
    settings = {"base_url": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}

    async def acall(client: Any) -> Any:
        answer = await litellm.acompletion(**ASKED, client=client, stream=stream)
        return [chunk async for chunk in answer] if stream else answer

    with guarded() as bursar:
        client = bursar.wrap(openai.OpenAI(**settings))
        answer = litellm.completion(**ASKED, client=client, stream=stream)
        # the same question on the client itself, while a stream is read or after the answer, is another call
        client.chat.completions.create(model="gpt-4o", messages=QUESTION, max_completion_tokens=500)
        list(answer) if stream else None
        asyncio.run(acall(bursar.wrap(openai.AsyncOpenAI(**settings))))
        provider.wait_idle()
        records = list(bursar.records())
        assert len(records) == provider.billed_calls == 3
        assert sum(record.cost_nanos for record in records) == provider.billed_nanos
        assert not any(record.estimated for record in records)


def test_what_litellm_sends_again_is_an_attempt_of_its_own(
    provider: Provider, guarded: Callable[[], AbstractContextManager[Bursar]]
) -> None:
    """Though it is the same in every word: the first one may have been billed."""
    provider.script([Fault("malformed")])
    with guarded() as bursar:
        litellm.completion(
            **ASKED, base_url=f"{provider.url}/v1", api_key="any", max_retries=0, fallbacks=["openai/gpt-4o"]
        )
        provider.wait_idle()
        assert provider.requests == 2
        assert [record.estimated for record in bursar.records()] == [True, False]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_is_booked_before_litellms_threads_log_it(
    stream: bool,
    provider: Provider,
    guarded: Callable[[], AbstractContextManager[Bursar]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They hold the interpreter's lock, which a store that writes has to take again and again."""
    submit = executor.submit
    logged: list[int] = []

    def watched(work: Any, *args: Any) -> Any:
        if "success_handler" in (work.__name__, *(getattr(one, "__name__", "") for one in args)):
            logged.append(bursar.store.open_reservations())
        return submit(work, *args)

    monkeypatch.setattr(executor, "submit", watched)
    with guarded() as bursar:
        answer = litellm.completion(**ASKED, base_url=f"{provider.url}/v1", api_key="any", stream=stream)
        list(answer) if stream else None
        provider.wait_idle()
        (record,) = bursar.records()
        assert (record.cost_nanos, record.estimated) == (provider.billed_nanos, False)
    assert set(logged) == {0}
