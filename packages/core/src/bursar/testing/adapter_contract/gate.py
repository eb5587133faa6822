"""The gate: what is refused, what is booked, and what costs nothing."""

from __future__ import annotations

from typing import Any

import pytest

from bursar import BudgetExceeded, Bursar, StoreError
from bursar.testing.adapter_contract.made import (
    COST_NANOS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    PROMPT,
    STYLES,
    Base,
    covered,
    records,
)
from bursar.testing.provider import Fault, Provider


class Gate(Base):
    """Nothing goes out that is not reserved, and every call is booked at what the provider billed."""

    @pytest.mark.parametrize("style", STYLES)
    def test_a_refusal_sends_nothing(self, style: str, provider: Provider) -> None:
        """The user's code sees BudgetExceeded, with its fields, once and not tried again; the provider sees no request."""
        self.need(style)
        retries: dict[str, Any] = {"retries": 2} if style in ("call", "acall") and "retries" not in self.lacks else {}
        with self.capped("0.001 USD") as bursar:
            with pytest.raises(BudgetExceeded) as caught:
                self.consume(style, provider.url, **retries)
            assert caught.value.budget == "cap"
            assert str(caught.value.limit) == "0.001"
            assert provider.requests == 0
            assert len([r for r in records(bursar) if r.outcome == "blocked"]) == 1
            assert bursar.store.open_reservations() == 0

    @pytest.mark.parametrize("style", STYLES)
    def test_a_call_settles_to_what_the_provider_billed(self, style: str, provider: Provider, bursar: Bursar) -> None:
        self.need(style)
        with self.install(bursar):
            self.consume(style, provider.url)
        provider.wait_idle()
        (record,) = records(bursar)
        assert (record.outcome, record.estimated) == ("completed", False)
        assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (INPUT_TOKENS, OUTPUT_TOKENS)
        assert record.cost_nanos == provider.billed_nanos == COST_NANOS
        assert (record.tags["provider"], record.tags["model"]) == ("openai", "gpt-4o")
        assert record.tags["connection"]
        assert record.tags["run"]

    def test_the_scope_and_two_event_loops(self, provider: Provider, bursar: Bursar) -> None:
        """A scope's tags reach the record, in every loop."""
        self.need("acall")
        with self.install(bursar):
            for run in ("first", "second"):
                with bursar.scope(team="research", run=run):
                    self.consume("acall", provider.url)
        assert [(r.tags["team"], r.tags["run"]) for r in records(bursar)] == [
            ("research", "first"),
            ("research", "second"),
        ]

    def test_several_answers_are_one_bill(self, provider: Provider, bursar: Bursar) -> None:
        self.need("n")
        with self.install(bursar):
            self.call(provider.url, PROMPT, n=3)
        (record,) = records(bursar)
        assert record.usage["output_tokens"] == 3 * OUTPUT_TOKENS
        assert record.cost_nanos == provider.billed_nanos

    def test_an_answer_from_the_cache_costs_nothing(self, provider: Provider, bursar: Bursar) -> None:
        self.need("cache")
        with self.install(bursar):
            self.cached(provider.url, PROMPT)
        covered(bursar, provider)
        assert provider.requests == 1
        assert sum(record.cost_nanos for record in records(bursar)) == COST_NANOS

    def test_a_fallback_is_a_call_of_its_own(self, provider: Provider, bursar: Bursar) -> None:
        """The first attempt may have been billed; the second one was."""
        self.need("fallback")
        provider.script([Fault("refuse", status=500)])
        with self.install(bursar):
            self.fall_back(provider.url, PROMPT)
        covered(bursar, provider)
        assert provider.requests == 2
        assert sorted((record.outcome, record.estimated) for record in records(bursar)) == [
            ("completed", False),
            ("failed", True),
        ]

    def test_a_fallback_is_no_way_around_a_refusal(self, provider: Provider) -> None:
        self.need("fallback")
        with self.capped("0.001 USD") as bursar:
            with pytest.raises(BudgetExceeded):
                self.fall_back(provider.url, PROMPT)
            assert provider.requests == 0
            assert bursar.store.open_reservations() == 0

    def test_an_internal_failure_fails_closed(self, provider: Provider, bursar: Bursar) -> None:
        """I12: while the store is out of reach nothing is sent."""
        with self.install(bursar):
            bursar.store.close()
            with pytest.raises(StoreError):
                self.call(provider.url, PROMPT)
            assert provider.requests == 0
