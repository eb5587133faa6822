"""LiteLLM inside of CrewAI, both guarded: CrewAI's call is charged once, and a tool's own call to LiteLLM as well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("crewai.hooks")  # the folder of these tests is a `crewai` too
pytest.importorskip("bursar_litellm")

import litellm
from crewai import LLM
from crewai.tools import BaseTool

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_crewai import install
from bursar_litellm import install as install_litellm


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(
        Answer(text="Thought: I know\nFinal Answer: done", input_tokens=1_000, output_tokens=500)
    ) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    with Bursar("memory:", [Budget("all", "1 USD")]) as bursar:
        uninstalls = [install(bursar), install_litellm(bursar)]
        yield bursar
        for uninstall in uninstalls:
            uninstall()


def llm(provider: Provider, **options: Any) -> LLM:
    settings = {"base_url": f"{provider.url}/v1", "api_key": "replayed", "max_tokens": 500, "num_retries": 0}
    return LLM(model="openai/gpt-4o", is_litellm=True, **settings, **options)


def charged(bursar: Bursar, provider: Provider, calls: int) -> None:
    provider.wait_idle()
    records = [record for record in bursar.records() if record.model]
    assert len(records) == provider.billed_calls == calls
    assert sum(record.cost_nanos for record in records) == provider.billed_nanos
    assert not any(record.estimated for record in records)
    assert bursar.store.open_reservations() == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_is_charged_once(stream: bool, provider: Provider, bursar: Bursar) -> None:
    client = llm(provider, stream=stream)
    assert type(client).__module__ == "crewai.llm"
    client.call("hello")
    client.call([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    asyncio.run(client.acall("hello"))
    charged(bursar, provider, 3)


def test_a_crew_is_charged_once_and_its_tools_call_to_litellm_too(
    provider: Provider, bursar: Bursar, crew: Callable[..., Any]
) -> None:
    class Ask(BaseTool):
        name: str = "ask"
        description: str = "Ask."

        def _run(self, query: str) -> str:
            litellm.completion(
                "openai/gpt-4o",
                [{"role": "user", "content": query}],
                base_url=f"{provider.url}/v1",
                api_key="any",
                max_tokens=500,
            )
            return "asked"

    provider.script(
        [
            Answer(tool_calls=[("ask", {"query": "x"})], input_tokens=1_000, output_tokens=500),
            Answer(text="from the tool", input_tokens=100, output_tokens=50),
        ]
    )
    crew(llm(provider), Ask()).kickoff()
    charged(bursar, provider, 3)


def test_what_crewai_may_not_send_litellm_does_not(provider: Provider) -> None:
    with Bursar("memory:", [Budget("all", "0.000001 USD")]) as bursar:
        uninstalls = [install(bursar), install_litellm(bursar)]
        with pytest.raises(BudgetExceeded):
            llm(provider).call("hello")
        for uninstall in uninstalls:
            uninstall()
        assert provider.requests == 0
        assert [record.outcome for record in bursar.records()] == ["blocked"]
