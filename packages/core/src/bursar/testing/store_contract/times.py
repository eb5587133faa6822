"""The contract of stores, on time: expiry, windows, rates, and limits that change."""

from __future__ import annotations

import pytest

from bursar.commands import (
    Ended,
    Expire,
    Extend,
    Extended,
    Granted,
    Refused,
    Rejected,
    Release,
    Settle,
)
from bursar.errors import StoreError
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock
from bursar.testing.store_contract.made import SECOND_US, TTL_US, Base, Run, charge, reserve, rule, settle


class Times(Base):
    """What time does to reservations and accounts; the store's clock decides."""

    # -- expiry

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

    # -- windows

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

    def test_i7_a_charge_in_a_window_that_has_not_begun_by_the_stores_clock_is_booked_in_it(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        """Its process had a clock that was ahead by the time that the store's was set back."""
        start_us = clock.now_us() + SECOND_US
        later = rule("org", 100, start_us=start_us, end_us=start_us + 60 * SECOND_US)
        assert type(run(charge("c1", (later, 30)))) is Ended
        account = self.account(store, later)
        assert (account.spent, account.rule.start_us) == (30, start_us)
        assert run(reserve("r1", (later, 30))) == Rejected("moved", "org")

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

    def test_a_rolling_window_forgets_one_bucket_at_a_time(self, store: Store, run: Run, clock: ManualClock) -> None:
        minute = rule("b", 100, "rolling", period_us=60 * SECOND_US)
        clock.set(clock.now_us() // (60 * SECOND_US) * 60 * SECOND_US)
        for id, amount in (("a", 60), ("b", 40)):  # in buckets side by side
            run(reserve(id, (minute, amount)))
            run(settle(id, amount))
            clock.advance(1)
        clock.advance(59, us=500_000)  # the first has left, and half of the second
        assert type(run(reserve("c", (minute, 61)))) is Refused
        assert type(run(reserve("c", (minute, 60)))) is Granted

    def test_a_rolling_window_ages_from_reserve_time(self, store: Store, run: Run, clock: ManualClock) -> None:
        minute = rule("b", 100, "rolling", period_us=60 * SECOND_US)
        run(reserve("a", (minute, 100)))
        clock.advance(59)
        run(settle("a", 90))
        assert self.account(store, minute).spent == 90
        clock.advance(2)
        assert type(run(reserve("b", (minute, 100)))) is Granted

    # -- rates and limits

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

    def test_an_account_for_which_others_wait_refuses_whatever_room_it_has(self, store: Store, run: Run) -> None:
        dollar, rate = rule("b", 100), rule("r", 5, "refill", "requests", period_us=SECOND_US)
        refused = run(reserve("a", (dollar, 10), (rate, 1), behind=rate.key))
        assert type(refused) is Refused
        assert (refused.account.rule, refused.asked, refused.retry_after_us) == (rate, 1, 0)
        assert (self.account(store, rate).refused, self.account(store, rate).reserved) == (1, 0)
        assert type(run(reserve("a", (dollar, 10), (rate, 1)))) is Granted

    def test_a_retry_after_suits_every_account(self, run: Run) -> None:
        slow, fast = (rule(f"every {s}", 1, "refill", "requests", period_us=s * SECOND_US) for s in (60, 1))
        run(reserve("a", (fast, 1), (slow, 1)))
        refused = run(reserve("b", (fast, 1), (slow, 1)))
        assert type(refused) is Refused
        assert (refused.account.rule, refused.retry_after_us) == (fast, 60 * SECOND_US)

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
        version, held = store.definitions()
        assert version == 3
        assert {name: held.definition["limit"] for name, held in held["budget"].items()} == {"b": "50", "c": "1"}
        assert store.definitions(since=1) == (3, held)
        assert store.definitions(since=2) == (3, {"budget": {"c": held["budget"]["c"]}})
        assert store.definitions(since=3) == (3, {})
        assert run(reserve("b", (rule("b", 100), 1), version=1)) == Rejected("stale", "3")
        assert type(run(reserve("b", (rule("b", 50), 1), version=3))) is Refused
        booked = run(charge("c", (rule("b", 100), 0), version=1))  # never refused, but an older policy changes no limit
        assert type(booked) is Ended
        assert booked.accounts[0].rule.limit == 50
        run(settle("a", 60))
        assert self.account(store, rule("b", 50)).spent == 60
        assert type(run(reserve("b", (rule("b", 61), 1), version=3))) is Granted
