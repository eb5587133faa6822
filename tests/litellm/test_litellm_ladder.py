"""Thresholds, questions and detectors through LiteLLM: as far as its hooks let a request be changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import litellm
import pytest

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Operator, Stopped, Threshold
from bursar.detect import Detectors
from bursar.testing.provider import Provider
from bursar_litellm import install

MESSAGES = [{"role": "user", "content": "abc " * 1_000}]
COST_NANOS = 7_500_000  # of one answer of the provider's

Guarded = Callable[..., AbstractContextManager[Bursar]]


def call(provider: Provider, **more: Any) -> Any:
    said = {"model": "openai/gpt-4o", "api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}
    return litellm.completion(messages=MESSAGES, **said | more)


def ten_calls(*thresholds: Threshold) -> Budget:
    return Budget("b", f"{10 * COST_NANOS / 10**9} USD", thresholds=thresholds)


def test_the_ladder_asks_where_it_cannot_change_the_request_and_kills_at_its_end(
    provider: Provider, guarded: Guarded
) -> None:
    ladder = [
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}),
        Threshold("90%", "kill"),
    ]
    with guarded(ten_calls(*ladder)) as bursar:
        for _ in range(8):
            call(provider, max_tokens=500)
        with pytest.raises(ApprovalRequired) as asked:
            call(provider, max_tokens=500)
        assert provider.billed_calls == 8
        operator = Operator(bursar.store)
        Operator(bursar.store, operator.appoint()).approve(asked.value.id)
        call(provider, max_tokens=500)
        with pytest.raises(Stopped) as killed:
            call(provider, max_tokens=500)
        assert killed.value.cause == "killed"
        fired = [alert.facts["action"] for alert, _ in bursar.store.alerts() if alert.kind == "threshold"]
        assert sorted(fired) == ["downgrade", "kill", "notify"]
        assert sum(record.cost_nanos for record in bursar.records()) == provider.billed_nanos == 9 * COST_NANOS


def test_a_maximum_that_nobody_set_is_clamped_on_the_wire(provider: Provider, guarded: Guarded) -> None:
    with guarded(ten_calls(Threshold("50%", "clamp", max_output_tokens=50))) as bursar:
        for _ in range(5):
            call(provider, max_tokens=500)
        call(provider)
        assert "clamp to 50 tokens at 50%" in [action for record in bursar.records() for action in record.actions]
        assert sum(record.cost_nanos for record in bursar.records()) == provider.billed_nanos
    assert provider.account[-1].output_tokens == 50


def test_an_operator_stops_an_agent(provider: Provider, guarded: Guarded) -> None:
    with guarded() as bursar, bursar.scope(agent="x"):
        Operator(bursar.store).freeze({"agent": "x"})
        with pytest.raises(Stopped) as caught:
            call(provider)
    assert (caught.value.cause, provider.requests) == ("frozen", 0)


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
        litellm.completion(
            model="openai/gpt-4o", api_base=f"{provider.url}/v1", api_key="any", max_retries=0, messages=list(messages)
        )
        wish = {"id": f"c{number}", "type": "function", "function": {"name": "search", "arguments": '{"q": "weather"}'}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [wish]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": "no such service"})
