"""The contract of stores: what the holders of leases draw."""

from __future__ import annotations

import pytest

from bursar.accounts import Mark, Rule
from bursar.commands import Draw, Drawn, Entry, Expire, Granted, Rejected, Release
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock
from bursar.testing.store_contract.made import TTL_US, Base, Run, reserve, rule, settle


class Leases(Base):
    """A lease is a reservation; its holder books by itself what it spends, and sends the entries later."""

    @staticmethod
    def spent(store: Store, id: str, amounts: dict[str, int], kind: str = "settlement") -> Entry:
        now_us = store.now_us()
        draft = {"path": ["r"], "tags": {"run": "r", "team": 'a"\t\\b\n'}, "cost_nanos": 0, "usage": {}}
        facts = {"model_answered": "m"}
        return Entry(
            id, kind, None, "completed", False, "", 3, {"output_tokens": 5}, amounts, now_us, now_us, "", draft, facts
        )

    def test_I2_what_is_drawn_comes_out_of_what_the_lease_holds(self, store: Store, run: Run) -> None:
        a, b = rule("a", 1_000), rule("b", 1_000)
        assert type(run(reserve("lease", (a, 300), (b, 300)))) is Granted
        entries = (self.spent(store, "x", {a.key: 50, b.key: 50}), self.spent(store, "y", {a.key: 70, b.key: 70}))
        answer = run(Draw("lease", (a, b), entries))
        assert type(answer) is Drawn
        assert (answer.new, answer.left) == (2, {a.key: 180, b.key: 180})
        for one in (a, b):
            account = self.account(store, one)
            assert (account.spent, account.reserved, account.overrun) == (120, 180, 0)
        assert [self.entry(store, entry.id) for entry in entries] == list(entries)
        held = next(iter(store.reservations()))
        assert (held.held, held.draft["cost_nanos"]) == (((a.key, "USD", 180), (b.key, "USD", 180)), 180)
        run(Release("lease"))
        assert (self.account(store, a).spent, self.account(store, a).reserved) == (120, 0)

    def test_I6_an_entry_that_is_on_the_books_is_left_alone(self, store: Store, run: Run) -> None:
        a = rule("a", 1_000)
        run(reserve("lease", (a, 300)))
        one, two = self.spent(store, "x", {a.key: 50}), self.spent(store, "y", {a.key: 70})
        run(Draw("lease", (a,), (one,)))
        answer = run(Draw("lease", (a,), (one, two)))
        assert type(answer) is Drawn
        assert (answer.new, answer.left) == (1, {a.key: 180})
        again = run(Draw("lease", (a,), (one, two)))
        assert type(again) is Drawn
        assert (again.new, again.left, again.accounts) == (0, {a.key: 180}, answer.accounts)
        changed = Draw("lease", (a,), (one._replace(cost_nanos=4), self.spent(store, "z", {a.key: 1})))
        assert run(changed) == Rejected("conflict", "x")
        assert self.account(store, a).spent == 120

    def test_I10_a_draw_that_is_rejected_books_nothing(self, store: Store, run: Run) -> None:
        a, b = rule("a", 1_000), rule("b", 1_000)
        run(reserve("lease", (a, 300)))
        entry = self.spent(store, "x", {a.key: 50, b.key: 50})
        assert run(Draw("lease", (a, b), (entry,), max_accounts=0)) == Rejected("accounts", "b")
        assert (list(store.entries()), self.account(store, a).spent) == ([], 0)
        answer = run(Draw("lease", (a, b), (entry,)))
        assert type(answer) is Drawn
        assert (answer.new, answer.left, self.account(store, b).spent) == (1, {a.key: 250}, 50)

    def test_nothing_to_draw_tells_what_the_lease_holds(self, store: Store, run: Run) -> None:
        a = rule("a", 1_000)
        run(reserve("lease", (a, 300)))
        answer = run(Draw("lease", (a,), ()))
        assert type(answer) is Drawn
        assert (answer.new, answer.left) == (0, {a.key: 300})

    @pytest.mark.parametrize("how", ["expired", "released", "never granted"])
    def test_I7_what_was_spent_is_booked_though_the_lease_is_over(
        self, store: Store, run: Run, clock: ManualClock, how: str
    ) -> None:
        a = rule("a", 1_000)
        if how != "never granted":
            run(reserve("lease", (a, 300)))
        if how == "expired":
            clock.advance(us=TTL_US)
            run(Expire("lease"))
        elif how == "released":
            run(Release("lease"))
        before = 300 if how == "expired" else 0
        answer = run(Draw("lease", (a,), (self.spent(store, "x", {a.key: 900}),)))
        assert type(answer) is Drawn
        assert (answer.new, answer.left) == (1, None)
        account = self.account(store, a)
        assert (account.spent, account.reserved, account.overrun) == (before + 900, 0, max(0, before - 100))
        if how == "expired":  # a late settlement says what the lease itself has cost: nothing
            run(settle("lease", 0))
            assert self.account(store, a).spent == 900

    def test_more_than_the_lease_holds_is_an_overrun_where_the_account_has_no_room(
        self, store: Store, run: Run
    ) -> None:
        a = rule("a", 1_000)
        run(reserve("lease", (a, 300)))
        run(reserve("other", (a, 600)))
        run(Draw("lease", (a,), (self.spent(store, "x", {a.key: 450}),), {a.key: 7}))
        account = self.account(store, a)
        assert (account.spent, account.reserved, account.overrun) == (450, 600, 50)
        run(Draw("lease", (a,), (self.spent(store, "y", {a.key: 0}),), {a.key: 7}))
        assert self.account(store, a).overrun == 57  # what the holder tells of its estimates counts

    def test_a_correction_gives_back_to_the_lease(self, store: Store, run: Run) -> None:
        a = rule("a", 1_000)
        run(reserve("lease", (a, 300)))
        run(Draw("lease", (a,), (self.spent(store, "x", {a.key: 200}, "expiry"),)))
        late = self.spent(store, "x~", {a.key: -150}, "correction")._replace(corrects="x")
        answer = run(Draw("lease", (a,), (late,)))
        assert type(answer) is Drawn
        assert answer.left == {a.key: 250}
        account = self.account(store, a)
        assert (account.spent, account.reserved) == (50, 250)

    def test_a_mark_is_told_once_by_the_draw_that_reaches_it(self, store: Store, run: Run) -> None:
        a = rule("a", 1_000, marks=(Mark(100, "notify"), Mark(1_000, "kill")))
        run(reserve("lease", (a, 300)))
        entries = (self.spent(store, "x", {a.key: 60}), self.spent(store, "y", {a.key: 60}))
        answer = run(Draw("lease", (a,), entries))
        assert type(answer) is Drawn
        assert [(alert.facts["mark"], alert.facts["spent"], alert.facts["call"]) for alert in answer.alerts] == [
            (0, 120, "y")
        ]
        again = run(Draw("lease", (a,), (self.spent(store, "z", {a.key: 60}),)))
        assert type(again) is Drawn
        assert again.alerts == ()
        assert [alert.kind for alert, _ in store.alerts()] == ["threshold"]

    def test_a_draw_changes_no_limit_by_an_older_policy_and_makes_a_new_window(
        self, store: Store, run: Run, clock: ManualClock
    ) -> None:
        a = rule("a", 1_000)
        run(reserve("lease", (a, 300)))
        store.publish({"a": {"name": "a", "limit": "1 USD"}})
        older: Rule = a._replace(limit=5)
        run(Draw("lease", (older,), (self.spent(store, "x", {a.key: 10}),)))
        assert self.account(store, a).rule.limit == 1_000
        now_us = clock.now_us()
        b = rule("b", 1_000, start_us=now_us, end_us=now_us + 10)
        clock.advance(us=20)  # its window is over already: what was incurred in it belongs to it
        run(Draw("lease", (b,), (self.spent(store, "y", {b.key: 10}),)))
        assert self.account(store, b).spent == 10
