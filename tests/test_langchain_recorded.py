"""Recorded runs, driven by LangChain's own agent loop: the ledger is the provider's account, to the nano-dollar."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bursar import Budget, Bursar
from bursar.testing.provider import Provider, Rates
from bursar_langchain import BursarCallbackHandler, BursarMiddleware

agents = pytest.importorskip("langchain.agents")
langchain_openai = pytest.importorskip("langchain_openai")
openai = pytest.importorskip("openai")
tools = pytest.importorskip("langchain_core.tools")

with gzip.open(Path(__file__).parent / "data" / "langchain" / "runs.jsonl.gz", "rt", encoding="utf-8") as lines:
    RUNS = [json.loads(line) for line in lines]
RATES = Rates(input_nanos=500, output_nanos=1_500)  # gpt-3.5-turbo


def tool_of(schema: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> Any:
    """The tool of that schema, which gives for the recorded arguments what the recorded one gave."""
    asked, outputs = {}, {}
    for step in steps:
        for message in step["request"]["messages"]:
            for call in message.get("tool_calls") or ():
                asked[call["id"]] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
            if message["role"] == "tool":
                outputs[asked[message["tool_call_id"]]] = message["content"]

    def run(**arguments: Any) -> str:
        return outputs.get(json.dumps(arguments, sort_keys=True), "no more is recorded")

    return tools.StructuredTool(
        name=schema["name"], description=schema["description"], args_schema=schema["parameters"], func=run
    )


def drive(model: Any, step: Mapping[str, Any], steps: list[Mapping[str, Any]], bursar: Bursar) -> None:
    """From this step on, as far as the framework goes by itself: an agent to its answer, a structured output once."""
    request = step["request"]
    system, messages = request["messages"][0], request["messages"][1:]
    if system["role"] != "system":
        chain = model.with_structured_output(request["tools"][0]["function"], method="function_calling")
        chain.invoke(request["messages"], config={"callbacks": [BursarCallbackHandler(bursar)]})
        return
    made = [tool_of(tool["function"], steps) for tool in request["tools"]]
    agent = agents.create_agent(
        model, made, system_prompt=system["content"], middleware=[BursarMiddleware(bursar)], name="planner"
    )
    agent.invoke({"messages": messages})


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["id"])
def test_a_recorded_run_is_booked_as_billed(run: Mapping[str, Any]) -> None:
    """Each answer is served once, in order; whatever was not asked for, or twice, would show as a difference."""
    steps = run["steps"]
    first = steps[0]["request"]
    with (
        Provider.from_run(steps, rates=RATES) as provider,
        Bursar("memory:", [Budget("all", "1 USD")]) as bursar,
        bursar.scope(run=run["id"]),
    ):
        model = langchain_openai.ChatOpenAI(
            model=first["model"],
            base_url=f"{provider.url}/v1",
            api_key="any",
            max_retries=0,
            streaming=first.get("stream") is True,
        )
        for _ in steps:
            if provider.requests < len(steps):
                with contextlib.suppress(openai.APIStatusError):  # one run begins with a key that was refused
                    drive(model, steps[provider.requests], steps, bursar)
        provider.wait_idle()
        billed = [one.cost_nanos for one in provider.account if one.billed]
        calls = [record for record in bursar.records() if "tool" not in record.tags]
        assert provider.requests == len(steps)
        assert len(billed) == sum(step["response"]["status"] == 200 for step in steps)
        assert [record.cost_nanos for record in calls if record.cost_nanos] == billed
        assert not any(record.estimated for record in calls)
        assert bursar.store.open_reservations() == 0
