"""Twenty runs at once share one budget: those that do not fit wait for headroom, and no more than the budget is spent.

Runs offline, against a local provider: `python examples/langchain_many_runs.py`.
"""

from __future__ import annotations

import asyncio

from langchain_openai import ChatOpenAI

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Provider
from bursar_langchain import install


async def run(model: ChatOpenAI, guard: Bursar, number: int) -> bool:
    """One run; True when it was answered within the budget."""
    with guard.scope(run=f"run-{number}"):
        try:
            await model.ainvoke("Say something about budgets.")
        except BudgetExceeded:
            return False
        return True


async def main() -> None:
    budget = Budget("shared", limit="0.05 USD", on_exceed="wait 30s")
    with (
        Provider(Answer(output_tokens=400), latency_s=0.05) as provider,
        Bursar("memory:", budgets=[budget]) as guard,
    ):
        uninstall = install(guard)  # every LangChain call of this process is guarded from here on
        model = ChatOpenAI(model="gpt-4o", base_url=f"{provider.url}/v1", api_key="local", max_tokens=400)
        answered = await asyncio.gather(*(run(model, guard, number) for number in range(20)))
        uninstall()
        (status,) = guard.status()
        print(
            f"{sum(answered)} of 20 runs were answered; ${status.spent} of ${status.limit} spent, ${status.reserved} open."
        )
        print(f"The provider billed {provider.billed_nanos:,} nano-dollars.")


if __name__ == "__main__":
    asyncio.run(main())
