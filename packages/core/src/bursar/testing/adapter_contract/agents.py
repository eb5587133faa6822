"""Agents with their tools, and embeddings."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest

from bursar import BudgetExceeded, Bursar
from bursar.testing.adapter_contract.made import BUDGETED, INPUT_TOKENS, OUTPUT_TOKENS, Base, covered, records
from bursar.testing.provider import Answer, Provider

DONE = Answer(text="Thought: I now know the answer\nFinal Answer: done", input_tokens=INPUT_TOKENS, output_tokens=100)


class Agents(Base):
    """Each call and each tool of an agent is booked once, under the agent and its run."""

    def test_an_agent_and_its_tool_are_attributed(self, provider: Provider, bursar: Bursar) -> None:
        self.need("agent")
        ran: list[str] = []

        def search(query: str) -> str:
            ran.append(query)
            return "found"

        provider.script([asks("x"), DONE])
        with self.install(bursar), bursar.scope(run="agent-run"):
            self.agent(provider.url, "Search for x.", search)
        covered(bursar, provider)
        assert ran == ["x"]
        attributed(bursar, tools=1)

    def test_tools_in_parallel_are_attributed(self, provider: Provider, bursar: Bursar) -> None:
        self.need("agent")
        ran: list[str] = []

        def search(query: str) -> str:
            ran.append(query)
            return f"found {query}"

        provider.script([asks("x", "y"), DONE])
        with self.install(bursar), bursar.scope(run="agent-run"):
            self.agent(provider.url, "Search for x and y.", search)
        covered(bursar, provider)
        assert sorted(ran) == ["x", "y"]
        attributed(bursar, tools=2)

    def test_an_agent_inside_of_another_ones_tool_is_booked_once(self, provider: Provider, bursar: Bursar) -> None:
        self.need("agent")

        def search(query: str) -> str:
            # a thread, for the outer agent may run in an event loop
            with ThreadPoolExecutor(1) as pool:
                inner = contextvars.copy_context().run
                pool.submit(inner, self.agent, provider.url, "Search deeper.", lambda query: "found").result()
            return "found"

        provider.script([asks("x"), asks("deeper"), DONE, DONE])
        with self.install(bursar), bursar.scope(run="agent-run"):
            self.agent(provider.url, "Search for x.", search)
        covered(bursar, provider)
        assert provider.billed_calls == 4
        attributed(bursar, tools=2)

    def test_a_looping_agent_stops_at_its_budget(self, provider: Provider) -> None:
        self.need("agent")
        provider.script(asks(f"x{turn}") for turn in range(30))
        with self.capped() as bursar:
            with pytest.raises(BudgetExceeded):
                self.agent(provider.url, "Search for x for ever.", lambda query: "nothing")
            assert 1 <= provider.billed_calls <= BUDGETED
            covered(bursar, provider)

    def test_embeddings_are_guarded(self, provider: Provider, bursar: Bursar) -> None:
        self.need("embed")
        with self.install(bursar):
            self.embed(provider.url, ["one text", "another"])
        assert [record.tags["model"] for record in records(bursar)] == ["text-embedding-3-small"]
        sent = provider.requests
        with self.capped("0.000000001 USD"), pytest.raises(BudgetExceeded):
            self.embed(provider.url, ["one text " * 100])
        assert provider.requests == sent


def asks(*queries: str) -> Answer:
    """An answer that asks for the tool, once for each of these."""
    calls = [("search", {"query": query}) for query in queries]
    return Answer(tool_calls=calls, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)


def attributed(bursar: Bursar, *, tools: int) -> None:
    """Every record names the agent's run, every call the agent, and there are so many records of its tool."""
    found = records(bursar)
    calls = [record for record in found if "model" in record.tags]
    assert [record.tags["agent"] for record in calls] == ["planner"] * len(calls)
    assert {record.tags["run"] for record in found} == {"agent-run"}
    assert [record.tags["tool"] for record in found if "model" not in record.tags] == ["search"] * tools
