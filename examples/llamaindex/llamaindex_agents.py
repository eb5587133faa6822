"""Two LlamaIndex agents that hand work to each other for ever, stopped at the budget of their run.

Run it offline against scripted answers, or with your own key: python examples/llamaindex/llamaindex_agents.py [--live]
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext

from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.llms.openai import OpenAI

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_llamaindex import guard_tool, install


def search(query: str) -> str:
    """Search the web."""
    return f"No results for {query!r}. Try again with other words."


def scripted(turn: int) -> Answer:
    """Search twice, then hand over to the other agent."""
    other = ("writer", "planner")[turn // 3 % 2]
    call = (
        ("handoff", {"to_agent": other, "reason": "your turn"}) if turn % 3 == 2 else ("search", {"query": f"{turn}"})
    )
    return Answer(tool_calls=[call], input_tokens=800, output_tokens=120)


async def run(team: AgentWorkflow) -> None:
    await team.run("Research agents for ever.", max_iterations=100)


def main(live: bool) -> None:
    with nullcontext() if live else Provider() as provider:
        settings = {} if provider is None else {"api_base": f"{provider.url}/v1", "api_key": "replayed"}
        if provider is not None:
            provider.script(scripted(turn) for turn in range(100))
        llm = OpenAI(model="gpt-4o-mini", max_tokens=300, max_retries=0, **settings)
        budgets = [Budget("per-run", limit="0.002 USD", per="run"), Budget("searches", limit="20 calls", per="run")]
        with Bursar("sqlite:///example.db", budgets=budgets) as bursar:
            uninstall = install(bursar, team="research")
            tools = [guard_tool(search)]
            agents = [
                FunctionAgent(name="planner", description="Plans.", llm=llm, tools=tools, can_handoff_to=["writer"]),
                FunctionAgent(name="writer", description="Writes.", llm=llm, tools=tools, can_handoff_to=["planner"]),
            ]
            try:
                asyncio.run(run(AgentWorkflow(agents=agents, root_agent="planner")))
            except BudgetExceeded as refused:
                print(refused)
            uninstall()
            for agent in ("planner", "writer"):
                cost = sum(record.cost_usd for record in bursar.records(agent=agent))
                print(f"{agent}: {cost} USD")
            for status in bursar.status():
                print(f"{status.name}: {status.spent} of {status.limit} {status.unit}")


if __name__ == "__main__":
    main("--live" in sys.argv[1:])
