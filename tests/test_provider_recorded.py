"""Recorded runs replayed to real clients: as they were, matched in order or by conversation, billed as they state."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from typing import Any

import pytest

from bursar.errors import InvalidInput
from bursar.testing.provider import Answer, Fault, Provider, Rates, Recorded, recorded

httpx = pytest.importorskip("httpx")
NAMES = sorted(
    path.name.removesuffix(".json")
    for path in (files("bursar.testing.provider") / "recorded").iterdir()
    if path.name.endswith(".json")
)
# (input, output, cache read, reasoning) of the whole recording, read by hand from its usage objects
STATED = {
    "anthropic-messages": (1_594, 132, 0, 0),
    "anthropic-stream": (21, 13, 0, 0),
    "gemini": (33, 74, 0, 64),
    "gemini-stream": (14, 29, 0, 0),
    "mcp-agent": (730, 52, 0, 0),
    "openai-embeddings": (4, 0, 0, 0),
    "openai-responses": (47, 80, 0, 64),
    "openai-responses-stream": (39, 16, 0, 0),
    "weather-agent": (1_235, 104, 0, 0),
}


def replay(provider: Provider, step: Recorded) -> Any:
    query = "?alt=sse" if "streamGenerate" in step.endpoint else ""
    return httpx.post(provider.url + step.endpoint + query, json=step.request, timeout=20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("match", ["order", "conversation"])
def test_a_recording_answers_its_own_requests_as_they_were(name: str, match: Any) -> None:
    steps = recorded(name)
    with Provider.from_run(steps, match=match) as provider:
        for step in steps:
            answer = replay(provider, step)
            assert answer.status_code == 200
            if step.events is None:
                assert answer.json() == step.body
                continue
            sent = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
            assert [data if data == "[DONE]" else json.loads(data) for data in sent] == step.data()
        provider.wait_idle()
        if name in STATED:
            parts = ("input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens")
            assert tuple(sum(getattr(entry, part) for entry in provider.account) for part in parts) == STATED[name]


def test_every_recording_names_its_source_and_licence() -> None:
    folder = files("bursar.testing.provider") / "recorded"
    readme = (folder / "README.md").read_text("utf-8")
    for name in NAMES:
        content = json.loads((folder / f"{name}.json").read_text("utf-8"))
        assert content["licence"] in ("MIT", "Apache-2.0")
        assert content["source"]
        assert f"`{name}`" in readme
    assert sum(len((folder / f"{name}.json").read_bytes()) for name in NAMES) < 150_000


def tools_of(steps: list[Recorded], calls: list[str]) -> list[Any]:
    """LangChain tools that give what the recorded tools gave."""
    core = pytest.importorskip("langchain_core.tools")
    outputs: dict[str, list[str]] = {}
    named: dict[str, str] = {}
    for message in steps[-1].request["messages"]:
        named.update({call["id"]: call["function"]["name"] for call in message.get("tool_calls") or []})
        if message["role"] == "tool":
            outputs.setdefault(named[message["tool_call_id"]], []).append(message["content"])

    def tool(schema: dict[str, Any]) -> Any:
        name, turn = schema["name"], iter(outputs.get(schema["name"], []))

        def run(**arguments: Any) -> str:
            calls.append(name)
            return next(turn)

        return core.StructuredTool(
            name=name, description=schema["description"], args_schema=schema["parameters"], func=run
        )

    return [tool(given["function"]) for given in steps[0].request["tools"]]


def agent(provider: Provider, steps: list[Recorded], calls: list[str], **options: Any) -> Any:
    agents, openai = pytest.importorskip("langchain.agents"), pytest.importorskip("langchain_openai")
    first, *_ = messages = steps[0].request["messages"]
    model = openai.ChatOpenAI(
        model=steps[0].request["model"], base_url=provider.url + "/v1", api_key="any", max_retries=0, **options
    )
    prompt = first["content"] if first["role"] == "system" else None
    return agents.create_agent(model, tools_of(steps, calls), system_prompt=prompt), {"messages": messages[-1:]}


def test_a_recorded_langchain_agent_runs_again_through_langchain() -> None:
    """Three streamed steps with a failing tool; the recording states no usage, so the bill counts characters."""
    steps = recorded("langchain-agent")
    calls: list[str] = []
    with Provider.from_run(steps, rates=Rates(input_nanos=500, output_nanos=1_500)) as provider:
        runner, given = agent(provider, steps, calls, streaming=True)
        final = runner.invoke(given)["messages"][-1]
        assert calls == ["tavily_search_results_json"] * 2
        assert final.content.startswith("It seems there is a persistent issue with accessing the search engine.")
        provider.wait_idle()
        assert [entry.stream for entry in provider.account] == [True] * 3
        assert provider.billed_nanos == sum(e.input_tokens * 500 + e.output_tokens * 1_500 for e in provider.account)
        assert all(entry.output_tokens > 0 for entry in provider.account)


def test_a_recorded_stream_states_usage_to_who_asks_for_it() -> None:
    steps = recorded("langchain-agent")
    calls: list[str] = []
    with Provider.from_run(steps) as provider:
        runner, given = agent(provider, steps, calls, streaming=True, stream_usage=True)
        answers = [message for message in runner.invoke(given)["messages"] if message.type == "ai"]
        provider.wait_idle()
        stated = [(answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]) for answer in answers]
        assert stated == [(entry.input_tokens, entry.output_tokens) for entry in provider.account]


def test_twenty_parallel_runs_of_a_recorded_agent_do_not_mix() -> None:
    """By conversation, each run gets its own next step whatever the others do."""
    steps = recorded("mcp-agent")

    async def one(provider: Provider) -> Any:
        calls: list[str] = []
        runner, given = agent(provider, steps, calls)
        result = await runner.ainvoke(given)
        return calls, result["messages"][-1].content

    async def run(provider: Provider) -> list[Any]:
        return await asyncio.gather(*(one(provider) for _ in range(20)))

    with Provider.from_run(steps, match="conversation") as provider:
        for calls, text in asyncio.run(run(provider)):
            assert calls == ["get_error", "get_error"]
            assert text.startswith("I called the tool with the correct parameter")
        assert provider.billed_calls == 60
        assert provider.billed_nanos == 20 * 2_345_000  # $0.002345, as the recording's usage costs


def test_answers_and_faults_can_be_steps_too() -> None:
    steps: list[Answer | Fault] = [
        Answer(tool_calls=[("search", {})]),
        Fault("refuse", status=500),
        Answer(text="done"),
    ]
    with Provider.from_run(steps, match="conversation") as provider:
        answers = []
        for turns in (2, 0, 1, 0):
            messages = [
                {"role": "user", "content": "x"},
                *({"role": "assistant", "content": "y"} for _ in range(turns)),
            ]
            answers.append(httpx.post(provider.url + "/v1/chat/completions", json={"model": "m", "messages": messages}))
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
        assert answers[0].json()["choices"][0]["message"]["content"] == "done"
        assert answers[1].json()["choices"][0]["message"]["tool_calls"]


def test_a_request_without_a_step_is_refused_and_not_billed() -> None:
    steps = recorded("mcp-agent")
    with Provider.from_run(steps[:1]) as provider:
        assert replay(provider, steps[0]).status_code == 200
        refused = replay(provider, steps[1])
        assert refused.status_code == 400
        assert "No recorded step" in refused.json()["error"]["message"]
        assert provider.billed_calls == 1
    with Provider.from_run(steps[:1]) as provider:
        asked = Recorded(endpoint=steps[0].endpoint, request=dict(steps[0].request) | {"stream": True})
        assert "plain body" in replay(provider, asked).json()["error"]["message"]


def test_a_recorded_refusal_is_not_billed() -> None:
    step = {
        "endpoint": "/v1/chat/completions",
        "request": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
        "response": {"status": 400, "body": {"error": {"message": "context_length_exceeded"}}},
    }
    with Provider.from_run([step]) as provider:
        assert replay(provider, Recorded.from_dict(step)).status_code == 400
        assert [(entry.status, entry.billed, entry.cost_nanos) for entry in provider.account] == [(400, False, 0)]


def test_what_is_no_recording_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="langchain-agent"):
        recorded("../server")
    with Provider() as provider, pytest.raises(InvalidInput, match="no step"):
        provider.script(["nonsense"])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="endpoint"):
        Provider.from_run([{"request": {}}])
