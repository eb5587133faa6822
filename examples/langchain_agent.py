"""An agent with a budget per run: its answers shrink to what is left, a tool too many is refused, and the books say why.

Runs offline, against a local provider: `python examples/langchain_agent.py`.
"""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

from bursar import Budget, Bursar, PriceBook
from bursar.testing.provider import Answer, Provider
from bursar_langchain import BursarMiddleware


def search(query: str) -> str:
    """Search the web."""
    return f"nothing about {query}"


def main() -> None:
    budgets = [
        Budget("per-run", limit="0.05 USD", per="run"),
        Budget("searches", limit="2 calls", per="run", match={"tool": "search"}),
    ]
    prices = PriceBook.packaged().with_overrides(tools={"search": "0.005"})
    again = Answer(input_tokens=400, output_tokens=60, tool_calls=[("search", {"query": "budgets"})])
    with (
        Provider(Answer(text="I found nothing.", input_tokens=900, output_tokens=40)) as provider,
        Bursar("sqlite:///bursar.db", budgets=budgets, prices=prices) as guard,
    ):
        provider.script([again, again, again])
        model = ChatOpenAI(model="gpt-4o", base_url=f"{provider.url}/v1", api_key="local")
        agent = create_agent(model, [search], middleware=[BursarMiddleware(guard, team="research")], name="scout")
        answer = agent.invoke({"messages": [("user", "What is new about budgets?")]})
        for message in answer["messages"]:
            print(f"{message.type:>5}: {message.text[:100]}")
        for record in guard.records(team="research"):
            what = record.tags.get("tool") or record.model
            print(f"{record.kind:>10} {what:<8} ${record.cost_usd:<10} {record.reason}")
        booked = sum(record.cost_nanos for record in guard.records() if not record.tags.get("tool"))
        print(f"The provider billed {provider.billed_nanos:,} nano-dollars; booked for its calls: {booked:,}.")


if __name__ == "__main__":
    main()
