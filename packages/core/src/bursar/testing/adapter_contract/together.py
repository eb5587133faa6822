"""Many calls at once: threads and tasks share what a budget has."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from bursar import BudgetExceeded
from bursar.testing.adapter_contract.made import BUDGETED, PROMPT, Base, covered
from bursar.testing.provider import Provider


class Together(Base):
    """Never more than the budget, and exactly as many where all wait for headroom."""

    @pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
    def test_fifty_threads_share_a_budget_for_ten(self, on_exceed: str, provider: Provider) -> None:
        with self.capped(on_exceed=on_exceed) as bursar, ThreadPoolExecutor(50) as pool:

            def one(_: int) -> None:
                with bursar.scope(team="capped"), contextlib.suppress(BudgetExceeded):
                    self.call(provider.url, PROMPT)

            list(pool.map(one, range(50)))
            assert provider.billed_calls == BUDGETED
            covered(bursar, provider)

    @pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
    def test_fifty_tasks_share_a_budget_for_ten(self, on_exceed: str, provider: Provider) -> None:
        self.need("acall")

        async def many() -> None:
            results = await asyncio.gather(
                *(self.acall(provider.url, PROMPT) for _ in range(50)), return_exceptions=True
            )
            assert all(isinstance(one, BudgetExceeded) for one in results if isinstance(one, BaseException))

        with self.capped(on_exceed=on_exceed) as bursar:
            asyncio.run(many())
            assert provider.billed_calls == BUDGETED
            covered(bursar, provider)
