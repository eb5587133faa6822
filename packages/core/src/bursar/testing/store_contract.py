"""The contract of stores: what every store must do, as a pytest class that its tests derive from."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from bursar.accounts import Account, Kind, Rule
from bursar.clock import Clock
from bursar.commands import (
    Answer,
    Charge,
    Command,
    Ended,
    Entry,
    Expire,
    Extend,
    Extended,
    Granted,
    Refused,
    Rejected,
    Release,
    Reserve,
    Settle,
)
from bursar.errors import StoreError
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock

SECOND_US = 1_000_000
TTL_US = 600 * SECOND_US

OpenStore = Callable[[Clock], Store]
Run = Callable[[Command], Answer]


def rule(budget: str, limit: int, kind: Kind = "window", unit: str = "USD", *, of: str = "", **more: Any) -> Rule:
    """The rule of an account of `budget`; `of` tells its accounts apart, `more` are further fields of Rule."""
    scope = {"run": of} if of else {}
    start_us = more.get("start_us", 0)
    key = json.dumps([budget, unit, f"{kind} {more.get('period_us', '')}", scope, start_us])
    return Rule(key, budget, json.dumps(scope), unit, kind, limit, **more)


def reserve(id: str, *lines: tuple[Rule, int], **more: Any) -> Reserve:
    """A reservation of these amounts, with an id that may be repeated (I6)."""
    held = max((amount for rule, amount in lines if rule.unit == "USD"), default=0)
    draft = {"path": ["r"], "tags": {"run": "r"}, "cost_nanos": held, "usage": {"output_tokens": 7}}
    fields: dict[str, Any] = {"ttl_us": TTL_US, "draft": draft, "digest": "d"} | more
    return Reserve(id, lines, **fields)


def settle(id: str, cost_nanos: int, **actuals: int) -> Settle:
    """The end of a reservation at this cost, and at these amounts of other units."""
    return Settle(id, {"USD": cost_nanos, **actuals}, cost_nanos, {"output_tokens": 5})


def charge(id: str, *lines: tuple[Rule, int], **more: Any) -> Charge:
    cost = max((amount for rule, amount in lines if rule.unit == "USD"), default=0)
    fields: dict[str, Any] = {"digest": "d"} | more
    return Charge(id, lines, cost, {}, {"path": ["r"], "tags": {"run": "r"}}, **fields)


class StoreContract:
    """Derive a test class and give it the fixture `open_store`: a function from a clock to a store.

    Called again within one test, `open_store` must open the same data again where `durable` is true. Every test runs
    through `execute` and through `aexecute`. The names in the tests (I1 ... I9) are the invariants of the design.
    """

    durable = True

    @pytest.fixture
    def open_store(self) -> OpenStore:
        raise NotImplementedError("a test class of a store gives the fixture `open_store`")

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def store(self, open_store: OpenStore, clock: ManualClock) -> Iterator[Store]:
        store = open_store(clock)
        yield store
        store.close()

    @pytest.fixture(params=["sync", "async"])
    def run(self, request: pytest.FixtureRequest, store: Store) -> Iterator[Run]:
        if request.param == "sync":
            yield store.execute
        else:
            with asyncio.Runner() as runner:
                yield lambda command: runner.run(store.aexecute(command))

    @staticmethod
    def account(store: Store, of: Rule) -> Account:
        found = list(store.accounts([of.key]))
        assert len(found) == 1
        return found[0]

    @staticmethod
    def entry(store: Store, id: str) -> Entry:
        return next(entry for entry in store.entries() if entry.id == id)

    # -- reserve ---------------------------------------------------------------------------------------------------

    def test_i1_admits_up_to_the_limit_and_not_one_more(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        assert type(run(reserve("a", (dollar, 60)))) is Granted
        refused = run(reserve("b", (dollar, 41)))
        assert type(refused) is Refused
        assert (refused.account.rule, refused.account.available, refused.asked) == (dollar, 40, 41)
        assert refused.may_free
        assert refused.retry_after_us is None
        assert type(run(reserve("c", (dollar, 40)))) is Granted
        assert type(run(reserve("d", (dollar, 1)))) is Refused

    def test_i1_a_budget_at_its_limit_admits_what_costs_nothing(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(charge("c", (dollar, 100)))
        assert type(run(reserve("a", (dollar, 0)))) is Granted

    def test_i2_i3_all_accounts_of_a_call_move_together_or_not_at_all(self, store: Store, run: Run) -> None:
        dollar, tokens, small = rule("b", 100), rule("t", 1_000, unit="tokens"), rule("s", 5, of="r")
        answer = run(reserve("a", (dollar, 60), (tokens, 500), (small, 6)))
        assert type(answer) is Refused
        assert answer.account.rule == small
        assert [account.rule.key for account, _ in answer.lines] == [dollar.key, tokens.key, small.key]
        assert all(account.reserved == 0 for account in store.accounts())
        answer = run(reserve("b", (dollar, 60), (tokens, 500), (small, 5)))
        assert type(answer) is Granted
        assert [account.reserved for account in answer.accounts] == [60, 500, 5]
        assert store.open_reservations() == 1

    def test_the_answer_names_the_first_account_that_is_short(self, store: Store, run: Run) -> None:
        first, second = rule("a", 10), rule("b", 10)
        answer = run(reserve("x", (first, 11), (second, 11)))
        assert type(answer) is Refused
        assert answer.account.rule == first

    def test_an_account_in_shadow_counts_and_never_refuses(self, store: Store, run: Run) -> None:
        shadow, dollar = rule("s", 10, enforce=False), rule("b", 100)
        answer = run(reserve("a", (shadow, 50), (dollar, 50)))
        assert type(answer) is Granted
        assert answer.shadowed == (shadow.key,)
        run(settle("a", 50))
        assert self.account(store, shadow).spent == 50

    def test_a_reservation_that_matches_no_account_holds_nothing_and_is_on_record(self, store: Store, run: Run) -> None:
        assert type(run(reserve("a"))) is Granted
        run(settle("a", 5))
        assert self.entry(store, "a").cost_nanos == 5

    def test_accounts_per_budget_are_bounded(self, store: Store, run: Run) -> None:
        for number in range(3):
            answer = run(reserve(f"a{number}", (rule("b", 9, of=f"r{number}"), 1), max_accounts=2))
            assert type(answer) is (Granted if number < 2 else Rejected)
        assert answer == Rejected("accounts", "b")
        known = run(reserve("again", (rule("b", 9, of="r1"), 1), max_accounts=2))
        assert type(known) is Granted
        late = run(charge("c", (rule("b", 9, of="r9"), 1), max_accounts=2))
        assert late == Rejected("accounts", "b")
        assert len(list(store.accounts())) == 2

    # -- settle and release ----------------------------------------------------------------------------------------

    def test_i3_settling_books_the_actual_and_gives_back_the_rest(self, store: Store, run: Run) -> None:
        dollar, tokens = rule("b", 100), rule("t", 1_000, unit="tokens")
        run(reserve("a", (dollar, 60), (tokens, 500)))
        answer = run(settle("a", 25, tokens=480))
        assert type(answer) is Ended
        assert [(account.spent, account.reserved) for account in answer.accounts] == [(25, 0), (480, 0)]
        entry = self.entry(store, "a")
        assert (entry.kind, entry.amounts, entry.cost_nanos) == (
            "settlement", {dollar.key: 25, tokens.key: 480}, 25,
        )  # fmt: skip
        assert not entry.estimated
        assert store.open_reservations() == 0

    def test_a_unit_without_an_actual_settles_at_its_reserved_amount(self, store: Store, run: Run) -> None:
        dollar, calls = rule("b", 100), rule("c", 10, unit="calls")
        run(reserve("a", (dollar, 60), (calls, 3)))
        run(settle("a", 25))
        assert self.account(store, calls).spent == 3

    def test_i7_a_real_cost_above_estimate_and_limit_is_booked_and_its_overrun_counted(
        self, store: Store, run: Run
    ) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        run(settle("a", 250))
        account = self.account(store, dollar)
        assert (account.spent, account.overrun, account.available) == (250, 190, -150)
        assert type(run(reserve("b", (dollar, 0)))) is Refused

    def test_release_gives_everything_back(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        answer = run(Release("a", "failed", "ConnectError"))
        assert type(answer) is Ended
        assert (answer.entry.kind, answer.entry.outcome, answer.entry.cost_nanos) == ("release", "failed", 0)
        account = self.account(store, dollar)
        assert (account.spent, account.reserved) == (0, 0)

    def test_i5_a_reservation_ends_once(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        run(settle("a", 25))
        assert run(Release("a")) == Rejected("ended", "settlement")
        assert run(Expire("a")) == Rejected("ended", "settlement")
        assert run(Extend("a", TTL_US)) == Rejected("ended", "settlement")
        run(reserve("b", (dollar, 60)))
        run(Release("b"))
        assert run(settle("b", 5)) == Rejected("ended", "release")
        assert self.account(store, dollar).spent == 25

    def test_commands_to_an_unknown_id_do_nothing(self, store: Store, run: Run) -> None:
        for command in (settle("x", 1), Release("x"), Extend("x", 1), Expire("x")):
            assert run(command) == Rejected("unknown", "x")
        assert list(store.entries()) == []

    # -- the same again --------------------------------------------------------------------------------------------

    def test_i6_a_repeated_reserve_has_no_second_effect(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        first = run(reserve("a", (dollar, 60)))
        assert type(first) is Granted
        again = run(reserve("a", (dollar, 60)))
        assert type(again) is Granted
        assert again.reservation == first.reservation
        assert self.account(store, dollar).reserved == 60
        assert run(reserve("a", (dollar, 60), digest="other")) == Rejected("conflict", "a")
        run(settle("a", 25))
        assert type(run(reserve("a", (dollar, 60)))) is Granted
        assert run(reserve("a", (dollar, 60), digest="other")) == Rejected("conflict", "a")
        assert (self.account(store, dollar).spent, self.account(store, dollar).reserved) == (25, 0)

    def test_i6_a_reserve_without_digest_repeated_while_open_has_no_second_effect(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        for _ in range(2):
            assert type(run(reserve("a", (dollar, 40), digest=""))) is Granted
        assert self.account(store, dollar).reserved == 40

    def test_i6_a_repeated_settlement_has_no_second_effect(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        first, again = run(settle("a", 25)), run(settle("a", 25))
        assert type(first) is Ended
        assert type(again) is Ended
        assert again.again
        assert again.entry == first.entry
        assert run(settle("a", 26)) == Rejected("conflict", "a")
        assert self.account(store, dollar).spent == 25

    def test_i6_a_repeated_release_has_no_second_effect(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        run(Release("a"))
        again = run(Release("a"))
        assert type(again) is Ended
        assert again.again

    def test_i6_a_repeated_charge_has_no_second_effect(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        for digest in ("d", ""):
            run(charge(f"a{digest}", (dollar, 30), digest=digest))
            again = run(charge(f"a{digest}", (dollar, 30), digest=digest))
            assert type(again) is Ended
            assert again.again
        assert self.account(store, dollar).spent == 60
        assert run(charge("ad", (dollar, 30), digest="other")) == Rejected("conflict", "ad")
        assert run(reserve("ad", (dollar, 1))) == Rejected("conflict", "ad")

    def test_i6_a_refused_id_may_be_tried_again(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        assert type(run(reserve("b", (dollar, 60)))) is Refused
        run(Release("a"))
        assert type(run(reserve("b", (dollar, 60)))) is Granted

    def test_i6_refusals_are_recorded_sixty_times_a_minute_and_then_counted(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        dollar = rule("b", 100)
        for number in range(70):
            run(reserve(f"r{number}", (dollar, 101)))
            clock.advance(us=1)
        clock.advance(60)
        run(reserve("later", (dollar, 101)))
        refusals = [entry for entry in store.entries() if entry.kind == "refusal"]
        assert len(refusals) == 61
        assert {(entry.outcome, entry.cost_nanos, str(entry.amounts)) for entry in refusals} == {("blocked", 0, "{}")}
        assert self.account(store, dollar).refused == 71

    def test_i6_a_quiet_refusal_leaves_no_trace(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        assert type(run(reserve("a", (dollar, 101), quiet=True))) is Refused
        assert list(store.entries()) == []
        assert list(store.accounts()) == []

    # -- expiry ----------------------------------------------------------------------------------------------------

    def test_i5_expiry_charges_what_was_reserved_as_estimated(self, store: Store, run: Run, clock: ManualClock) -> None:
        dollar, tokens = rule("b", 100), rule("t", 1_000, unit="tokens")
        run(reserve("a", (dollar, 60), (tokens, 500)))
        clock.advance(600, us=-1)
        assert run(Expire("a")) == Rejected("live", "a")
        assert store.sweep() == 0
        clock.advance(us=1)
        assert store.sweep() == 1
        assert store.sweep() == 0
        entry = self.entry(store, "a")
        assert (entry.kind, entry.outcome, entry.cost_nanos, entry.usage) == (
            "expiry", "cancelled", 60, {"output_tokens": 7},
        )  # fmt: skip
        assert entry.estimated
        assert (self.account(store, dollar).spent, self.account(store, tokens).spent) == (60, 500)
        assert store.open_reservations() == 0

    def test_i5_expiry_releases_where_told_to(self, store: Store, run: Run, clock: ManualClock) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60), on_expiry="release"))
        clock.advance(600)
        store.sweep()
        assert (self.account(store, dollar).spent, self.account(store, dollar).reserved) == (0, 0)
        run(settle("a", 25))
        assert self.account(store, dollar).spent == 25

    def test_i5_slots_are_free_at_once_when_a_call_ends_or_expires(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        slots, dollar = rule("s", 2, "slots", "slots"), rule("b", 100)
        for id in "ab":
            run(reserve(id, (slots, 1), (dollar, 10)))
        assert type(run(reserve("c", (slots, 1), (dollar, 10)))) is Refused
        run(settle("a", 5))
        assert type(run(reserve("c", (slots, 1), (dollar, 10)))) is Granted
        clock.advance(600)
        store.sweep()
        account = self.account(store, slots)
        assert (account.reserved, account.spent, account.available) == (0, 0, 2)
        run(settle("b", 7))
        assert self.account(store, slots).available == 2

    @pytest.mark.parametrize("actual", [0, 59, 60, 61, 500])
    def test_i5_i7_a_late_settlement_corrects_the_expiry(
        self, store: Store, run: Run, clock: ManualClock, actual: int
    ) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        clock.advance(600)
        store.sweep()
        answer = run(settle("a", actual))
        assert type(answer) is Ended
        assert (answer.entry.kind, answer.entry.corrects) == ("correction", "a")
        entries = list(store.entries())
        assert [entry.kind for entry in entries] == ["expiry", "correction"]
        assert sum(entry.cost_nanos for entry in entries) == actual
        assert sum(entry.usage.get("output_tokens", 0) for entry in entries) == 5
        account = self.account(store, dollar)
        assert (account.spent, account.reserved, account.overrun) == (actual, 0, max(0, actual - 60))
        again = run(settle("a", actual))
        assert type(again) is Ended
        assert again.again
        assert run(settle("a", actual + 1)) == Rejected("ended", "correction")
        assert run(Release("a")) == Rejected("ended", "correction")
        assert self.account(store, dollar).spent == actual

    def test_i5_an_operator_takes_an_expired_reservation_off_the_books_once(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        clock.advance(600)
        store.sweep()
        answer = run(Release("a", reason="not on the provider's bill"))
        assert type(answer) is Ended
        assert (answer.entry.kind, answer.entry.cost_nanos, answer.entry.amounts) == (
            "reversal", -60, {dollar.key: -60},
        )  # fmt: skip
        again = run(Release("a"))
        assert type(again) is Ended
        assert again.again
        assert run(settle("a", 60)) == Rejected("ended", "reversal")
        assert self.account(store, dollar).spent == 0

    def test_a_late_settlement_may_tell_of_any_usage(self, store: Store, run: Run, clock: ManualClock) -> None:
        dollar = rule("b", 100)
        usage = {
            "output_tokens": 3,
            "batch": True,
            "model": "m-2",
            "server_tools": {"web_search": 2},
            "other_models": [{"model": "m-3", "output_tokens": 1}],
        }
        run(reserve("a", (dollar, 60)))
        clock.advance(600)
        store.sweep()
        run(Settle("a", {"USD": 9}, 9, usage))
        assert self.entry(store, "a~").usage == usage | {"output_tokens": 3 - 7}

    def test_i8_an_extension_never_shortens(self, store: Store, run: Run, clock: ManualClock) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        start_us = clock.now_us()
        assert run(Extend("a", SECOND_US)) == Extended(start_us + TTL_US)
        clock.advance(500)
        assert run(Extend("a", TTL_US)) == Extended(start_us + TTL_US + 500 * SECOND_US)
        clock.advance(599)
        assert store.sweep() == 0
        clock.advance(1)
        assert store.sweep() == 1

    def test_i9_a_sweep_ends_every_overdue_reservation_and_no_other(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        dollar = rule("b", 10_000)
        for number in range(30):
            run(reserve(f"a{number}", (dollar, 1), ttl_us=(1 + number % 2) * SECOND_US))
        clock.advance(1)
        assert store.sweep() == 15
        assert store.open_reservations() == 15
        assert (self.account(store, dollar).spent, self.account(store, dollar).reserved) == (15, 15)

    def test_i8_time_never_runs_back(self, store: Store, run: Run, clock: ManualClock) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        start_us = store.now_us()
        clock.advance(-30)
        assert store.now_us() == start_us
        assert type(run(settle("a", 1))) is Ended
        assert self.entry(store, "a").settled_us >= start_us

    def test_i8_a_host_clock_far_behind_is_an_error_that_says_so(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        clock.advance(-120)
        with pytest.raises(StoreError, match="120 s behind") as caught:
            run(settle("a", 1))
        assert caught.value.fault == "clock"
        clock.advance(120)
        assert type(run(settle("a", 1))) is Ended

    # -- charges ---------------------------------------------------------------------------------------------------

    def test_i7_a_charge_is_never_refused(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 80)))
        answer = run(charge("c", (dollar, 50)))
        assert type(answer) is Ended
        account = self.account(store, dollar)
        assert (account.spent, account.reserved, account.overrun) == (50, 80, 30)
        run(charge("d", (dollar, 5)))
        assert self.account(store, dollar).overrun == 35
        assert self.entry(store, "c").kind == "charge"

    # -- windows ---------------------------------------------------------------------------------------------------

    def test_a_call_belongs_to_the_window_of_its_reserve_time(self, store: Store, run: Run, clock: ManualClock) -> None:
        start_us = clock.now_us()
        first, second = (
            rule("b", 100, start_us=start_us + at * SECOND_US, end_us=start_us + (at + 60) * SECOND_US)
            for at in (0, 60)
        )
        run(reserve("a", (first, 60)))
        refused = run(reserve("b", (first, 60)))
        assert type(refused) is Refused
        assert refused.retry_after_us == 60 * SECOND_US
        clock.advance(60)
        assert run(reserve("c", (first, 1))) == Rejected("moved", "b")
        assert type(run(reserve("c", (second, 100)))) is Granted
        run(settle("a", 99))
        assert (self.account(store, first).spent, self.account(store, first).reserved) == (99, 0)
        assert type(run(charge("d", (first, 1)))) is Ended  # incurred in the first, told in the second
        assert self.account(store, first).spent == 100
        assert (self.account(store, second).spent, self.account(store, second).reserved) == (0, 100)

    def test_a_rolling_window_forgets_a_bucket_when_it_is_wholly_outside(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        minute = rule("b", 100, "rolling", period_us=60 * SECOND_US)
        clock.set(clock.now_us() // (60 * SECOND_US) * 60 * SECOND_US)  # where a bucket begins
        clock.advance(us=999_999)
        run(reserve("a", (minute, 100)))
        run(settle("a", 100))
        refused = run(reserve("b", (minute, 1)))
        assert type(refused) is Refused
        assert refused.retry_after_us == 60 * SECOND_US + 1
        clock.advance(60)
        assert type(run(reserve("b", (minute, 1)))) is Refused
        clock.advance(us=1)
        assert type(run(reserve("b", (minute, 100)))) is Granted

    def test_a_rolling_window_ages_from_reserve_time(self, store: Store, run: Run, clock: ManualClock) -> None:
        minute = rule("b", 100, "rolling", period_us=60 * SECOND_US)
        run(reserve("a", (minute, 100)))
        clock.advance(59)
        run(settle("a", 90))
        assert self.account(store, minute).spent == 90
        clock.advance(2)
        assert type(run(reserve("b", (minute, 100)))) is Granted

    # -- rates and limits ------------------------------------------------------------------------------------------

    def test_a_refill_keeps_its_remainder(self, store: Store, run: Run, clock: ManualClock) -> None:
        rate = rule("b", 7, "refill", "requests", period_us=60 * SECOND_US)
        run(reserve("a", (rate, 7)))
        for at_us in range(1, 10_000_001, 333_333):
            clock.advance(us=333_333)
            refused = run(reserve("x", (rate, 7), quiet=True))
            assert type(refused) is Refused
            gained = (at_us - 1 + 333_333) * 7 // (60 * SECOND_US)
            assert refused.account.level == gained
            left_us = -(-7 * 60 * SECOND_US // 7) - (at_us - 1 + 333_333)
            assert refused.retry_after_us == left_us

    def test_a_refill_refuses_and_accepts_at_the_exact_microsecond(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        rate = rule("b", 7, "refill", "requests", period_us=60 * SECOND_US)
        run(reserve("a", (rate, 7)))
        refused = run(reserve("x", (rate, 1)))
        assert type(refused) is Refused
        assert refused.retry_after_us == -(-60 * SECOND_US // 7)
        clock.advance(us=refused.retry_after_us - 1)
        assert type(run(reserve("x", (rate, 1)))) is Refused
        clock.advance(us=1)
        assert type(run(reserve("x", (rate, 1)))) is Granted

    def test_a_refill_moves_by_the_difference_is_capped_and_may_go_negative(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        rate = rule("b", 60, "refill", "tokens", period_us=60 * SECOND_US)
        run(reserve("a", (rate, 20)))
        run(settle("a", 0, tokens=50))
        assert self.account(store, rate).level == 10
        run(reserve("b", (rate, 10)))
        run(settle("b", 0, tokens=45))
        assert self.account(store, rate).level == -35
        clock.advance(10)
        run(reserve("c", (rate, 0), quiet=True))
        clock.advance(100)
        run(reserve("d", (rate, 60)))
        clock.advance(30)
        run(settle("d", 0, tokens=0))
        assert self.account(store, rate).level == 60

    def test_what_exceeds_a_refills_burst_never_fits(self, store: Store, run: Run) -> None:
        refused = run(reserve("a", (rule("b", 60, "refill", "tokens", period_us=SECOND_US), 61)))
        assert type(refused) is Refused
        assert refused.retry_after_us is None
        assert not refused.may_free

    def test_the_newest_limit_holds_and_a_stale_process_is_told(self, store: Store, run: Run) -> None:
        assert store.publish({"b": {"limit": "100"}}) == 1
        assert store.publish({"b": {"limit": "100"}}) == 1
        run(reserve("a", (rule("b", 100), 60), version=1))
        assert store.publish({"b": {"limit": "50"}, "c": {"limit": "1"}}) == 3
        version, budgets = store.budgets()
        assert version == 3
        assert {name: held.definition["limit"] for name, held in budgets.items()} == {"b": "50", "c": "1"}
        assert run(reserve("b", (rule("b", 100), 1), version=1)) == Rejected("stale", "3")
        assert type(run(reserve("b", (rule("b", 50), 1), version=3))) is Refused
        run(settle("a", 60))
        assert self.account(store, rule("b", 50)).spent == 60
        assert type(run(reserve("b", (rule("b", 61), 1), version=3))) is Granted

    # -- many at once, and again -----------------------------------------------------------------------------------

    def test_i1_sixteen_threads_are_granted_exactly_what_fits(self, store: Store, run: Run) -> None:
        shared = rule("b", 50)
        numbers, granted = count(), []

        def work() -> None:
            while (number := next(numbers)) < 200:
                own = rule("own", 10**9, of=str(number % 16))
                lines = ((shared, 1), (own, 1)) if number % 2 else ((own, 1), (shared, 1))
                if type(store.execute(reserve(f"a{number}", *lines))) is Granted:
                    granted.append(f"a{number}")

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 50
        assert self.account(store, shared).reserved == 50
        for id in granted:
            run(settle(id, 1))
        assert self.account(store, shared).spent == 50

    def test_i1_a_hundred_tasks_are_granted_exactly_what_fits(self, store: Store) -> None:
        shared = rule("b", 30)

        async def all_at_once() -> list[Answer]:
            return await asyncio.gather(*(store.aexecute(reserve(f"a{n}", (shared, 1))) for n in range(100)))

        answers = asyncio.run(all_at_once())
        assert [type(answer) for answer in answers].count(Granted) == 30
        answers = asyncio.run(all_at_once())  # another loop: the same commands, the same answers
        assert [type(answer) for answer in answers].count(Granted) == 30
        assert self.account(store, shared).reserved == 30

    def test_what_is_posted_is_done(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        store.post(Release("a"))
        answer = run(Release("a"))
        assert type(answer) is Ended

    def test_entries_are_found_by_their_tags_in_the_order_of_ids(self, store: Store) -> None:
        dollar = rule("b", 10**9)
        reserves, settles = [], []
        for number in range(1_205):
            tags = {"run": f"r{number % 3}", "colour": "red" if number % 2 else 'a "quoted" blue'}
            draft = {"path": [], "tags": tags, "cost_nanos": 1, "usage": {}}
            reserves.append(reserve(f"{number:05}", (dollar, 1), draft=draft))
            settles.append(settle(f"{number:05}", 1))

        async def all_of_them() -> None:
            await asyncio.gather(*map(store.aexecute, reserves))
            await asyncio.gather(*map(store.aexecute, settles))

        asyncio.run(all_of_them())
        ids = [entry.id for entry in store.entries({})]
        assert ids == sorted(ids)
        assert len(ids) == 1_205
        assert sum(1 for _ in store.entries({"run": "r1", "colour": "red"})) == 201
        assert sum(1 for _ in store.entries({"colour": 'a "quoted" blue'})) == 603
        assert list(store.entries({"run": "none"})) == []

    def test_i7_reopening_shows_the_same_books(
        self, open_store: OpenStore, store: Store, run: Run, clock: ManualClock
    ) -> None:
        if not self.durable:
            pytest.skip("this store does not outlive its process")
        minute = rule("m", 100, "rolling", period_us=60 * SECOND_US)
        rate = rule("r", 7, "refill", "requests", period_us=60 * SECOND_US)
        run(reserve("a", (minute, 60), (rate, 3)))
        run(settle("a", 25, requests=2))
        run(reserve("b", (minute, 30), (rate, 1)))
        run(reserve("c", (minute, 500), (rate, 1)))
        store.publish({"m": {"limit": "100"}})
        before = list(store.accounts()), list(store.entries()), store.budgets(), store.open_reservations()
        again = open_store(clock)
        try:
            assert (list(again.accounts()), list(again.entries()), again.budgets(), again.open_reservations()) == before
            assert type(again.execute(reserve("b", (minute, 30), (rate, 1)))) is Granted
            assert type(again.execute(settle("b", 30))) is Ended
            settled = run(settle("b", 30))
            assert type(settled) is Ended
            assert settled.again
        finally:
            again.close()

    def test_i8_a_store_that_is_opened_again_does_not_run_back(
        self, open_store: OpenStore, store: Store, run: Run, clock: ManualClock
    ) -> None:
        if not self.durable:
            pytest.skip("this store does not outlive its process")
        run(reserve("a", (rule("b", 100), 60)))
        start_us = clock.now_us()
        clock.advance(-50)
        again = open_store(clock)
        try:
            assert again.now_us() == start_us
        finally:
            again.close()

    def test_a_closed_store_says_so(self, store: Store, run: Run) -> None:
        store.close()
        with pytest.raises(StoreError, match="closed") as caught:
            run(reserve("a", (rule("b", 100), 60)))
        assert caught.value.fault == "closed"
        store.close()
