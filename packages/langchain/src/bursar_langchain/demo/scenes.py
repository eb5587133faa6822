"""The scenes of the demo: what each agent does, against a replaying provider or, live, the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider, Recorded, recorded
from bursar_langchain import BursarCallbackHandler

BUDGETS = [
    Budget("looping-run", "0.05 USD", per="run", match={"agent": "looper"}),
    Budget("swarm", "1 USD", match={"agent": "swarm-*"}),
    Budget("everything", "5 USD", window="day"),
]
TOOLS = {"search": "0.001 USD"}
SWARM_RUNS = 20
LOOPS = 40


@dataclass
class Stage:
    """What a scene needs: the guard, the model to ask for, and where the provider is (None: the real one)."""

    bursar: Bursar
    model: str
    live: bool

    @contextmanager
    def provider(self, answer: Answer, latency_s: float = 0.0) -> Iterator[Provider | None]:
        """A provider that gives this answer to every call; live, none."""
        if self.live:
            yield None
            return
        with Provider(answer, latency_s=latency_s) as provider:
            yield provider

    def chat(self, provider: Provider | None, **options: Any) -> Any:
        """The real ChatOpenAI client, without retries of its own."""
        from langchain_openai import ChatOpenAI

        if provider is not None:
            options |= {"base_url": provider.url + "/v1", "api_key": "replayed"}
        return ChatOpenAI(model=self.model, max_retries=0, stream_usage=True, **options)


@dataclass
class Played:
    """How a scene ended: in words, and the provider's side of it (None when live)."""

    said: str
    billed_nanos: int | None
    calls: int | None


def _played(said: str, provider: Provider | None) -> Played:
    if provider is None:
        return Played(said, None, None)
    provider.wait_idle()
    return Played(said, provider.billed_nanos, provider.billed_calls)


def _agent(chat: Any, tools: list[Any], name: str, prompt: str | None = None) -> Any:
    from langchain.agents import create_agent

    return create_agent(chat, tools, name=name, system_prompt=prompt)


def _search(query: str) -> str:
    """Search the web."""
    return f"No results for {query!r}. Try again with other words."


def _search_tool() -> Any:
    from langchain_core.tools import StructuredTool

    return StructuredTool.from_function(_search, name="search")


def _ask(stage: Stage, agent: Any, question: str, name: str, run: str) -> str:
    """Run an agent to its end; what stopped it, or that it finished."""
    handler = BursarCallbackHandler(stage.bursar)
    with stage.bursar.scope(workflow="demo", agent=name, run=run):
        try:
            agent.invoke(
                {"messages": [("user", question)]}, config={"callbacks": [handler], "recursion_limit": 2 * LOOPS}
            )
        except BudgetExceeded as refused:
            return f"stopped: {refused}"
    return "finished within its budget"


def recorded_agent(stage: Stage) -> Played:
    """A recorded agent with real tools runs again, within its budget."""
    if stage.live:
        chat = stage.chat(None)
        said = _ask(stage, _agent(chat, [_search_tool()], "recorded"), "What is 17 times 23?", "recorded", "recorded-1")
        return _played(said, None)
    steps = recorded("mcp-agent")
    with Provider.from_run(steps) as provider:
        messages = steps[0].request["messages"]
        prompt = next((message["content"] for message in messages if message["role"] == "system"), None)
        agent = _agent(stage.chat(provider), _recorded_tools(steps), "recorded", prompt)
        return _played(_ask(stage, agent, messages[-1]["content"], "recorded", "recorded-1"), provider)


def _recorded_tools(steps: list[Recorded]) -> list[Any]:
    """Tools that give what they gave when the run was recorded."""
    from langchain_core.tools import StructuredTool

    names: dict[str, str] = {}
    outputs: dict[str, list[str]] = {}
    for message in steps[-1].request["messages"]:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or []}
        if message["role"] == "tool":
            outputs.setdefault(names[message["tool_call_id"]], []).append(message["content"])

    def tool(schema: dict[str, Any]) -> Any:
        turns = iter(outputs.get(schema["name"], []))

        def run(**arguments: Any) -> str:
            return next(turns, "no result was recorded")

        return StructuredTool(
            name=schema["name"], description=schema["description"], args_schema=schema["parameters"], func=run
        )

    return [tool(given["function"]) for given in steps[0].request["tools"]]


def loop_and_burn(stage: Stage) -> Played:
    """An agent that never comes to an end is stopped at $0.05."""
    searching = Answer(tool_calls=[("search", {"query": "the answer"})], output_tokens=500)
    with stage.provider(searching) as provider:
        agent = _agent(stage.chat(provider), [_search_tool()], "looper", "Search again until you find a result.")
        return _played(_ask(stage, agent, "Find the answer.", "looper", "loop-1"), provider)


def swarm(stage: Stage) -> Played:
    """Twenty runs at once share one dollar."""
    searching = Answer(tool_calls=[("search", {"query": "the answer"})], output_tokens=500)
    with stage.provider(searching, latency_s=0.02) as provider:

        def one(number: int) -> str:
            name = f"swarm-{number:02}"
            agent = _agent(stage.chat(provider), [_search_tool()], name, "Search until you find a result.")
            return _ask(stage, agent, "Find the answer.", name, f"swarm-run-{number:02}")

        with ThreadPoolExecutor(SWARM_RUNS) as pool:
            ends = list(pool.map(one, range(1, SWARM_RUNS + 1)))
        stopped = [end for end in ends if end.startswith("stopped")]
        return _played(f"{len(stopped)} of {SWARM_RUNS} runs {stopped[0] if stopped else 'were stopped'}", provider)


def abandoned_stream(stage: Stage) -> Played:
    """A stream whose reader leaves after the third chunk is paid for all the same."""
    story = Answer(text="Once upon a time " * 20, output_tokens=500, chunks=40)
    with stage.provider(story) as provider, stage.bursar.scope(workflow="demo", agent="reader", run="stream-1"):
        chat = stage.chat(provider, max_tokens=500)
        stream = chat.stream("Tell me a story.", config={"callbacks": [BursarCallbackHandler(stage.bursar)]})
        for _ in range(3):
            next(stream)
        stream.close()
        return _played("left after 3 chunks: what it cost is not known, so what was reserved is booked", provider)


def timed_out(stage: Stage) -> Played:
    """A call whose client gives up may have been billed, so it is booked."""
    slow = Answer(text="Too late.", output_tokens=500)
    with (
        stage.provider(slow, latency_s=1.0) as provider,
        stage.bursar.scope(workflow="demo", agent="hasty", run="timeout-1"),
    ):
        chat = stage.chat(provider, max_tokens=500, timeout=0.3 if provider else 0.001)
        try:
            chat.invoke("Answer at once.", config={"callbacks": [BursarCallbackHandler(stage.bursar)]})
            said = "answered in time"
        except Exception as error:  # noqa: BLE001 - whichever class the client's version raises for a time-out is the scene
            said = f"{type(error).__name__}: the answer is lost, so what was reserved is booked"
        return _played(said, provider)


SCENES: dict[str, Callable[[Stage], Played]] = {
    "a recorded agent": recorded_agent,
    "loop and burn": loop_and_burn,
    "twenty runs, one dollar": swarm,
    "an abandoned stream": abandoned_stream,
    "a call that times out": timed_out,
}
LIVE_SCENES = ("a recorded agent", "loop and burn", "an abandoned stream", "a call that times out")
