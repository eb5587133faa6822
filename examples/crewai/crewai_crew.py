"""A crew that never stops searching, stopped at its budget.

Run it offline against scripted answers, or with your own key: python examples/crewai/crewai_crew.py [--live]
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_crewai import BursarCrew


@tool("search")
def search(query: str) -> str:
    """Search the web."""
    return f"No results for {query!r}. Try again with other words."


def main(live: bool) -> None:
    logging.disable()  # CrewAI logs every error before it raises it
    answers = (Answer(tool_calls=[("search", {"query": f"agents {turn}"})], output_tokens=300) for turn in range(100))
    with nullcontext() if live else Provider() as provider:
        settings = {} if provider is None else {"base_url": f"{provider.url}/v1", "api_key": "replayed"}
        if provider is not None:
            provider.script(answers)
        llm = LLM(model="gpt-4o-mini", max_tokens=300, **settings)
        researcher = Agent(
            role="researcher", goal="Find everything.", backstory="Never gives up.", llm=llm, tools=[search]
        )
        task = Task(description="Research agents for ever.", expected_output="a report", agent=researcher)
        budgets = [Budget("per-run", limit="0.002 USD", per="run"), Budget("searches", limit="20 calls", per="run")]
        with Bursar("sqlite:///example.db", budgets=budgets) as bursar:
            guard = BursarCrew(bursar, team="research")
            crew = Crew(name="research", agents=[researcher], tasks=[task], step_callback=guard.step_callback)
            try:
                crew.kickoff()
            except BudgetExceeded as refused:
                print(refused)
            for status in bursar.status():
                print(f"{status.name}: {status.spent} of {status.limit} {status.unit}")


if __name__ == "__main__":
    main("--live" in sys.argv[1:])
