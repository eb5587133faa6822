"""The contract of stores, on amounts: admission, settlement, what is done twice, charges."""

from __future__ import annotations

from bursar.commands import (
    Ended,
    Expire,
    Extend,
    Granted,
    Refused,
    Rejected,
    Release,
)
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock
from bursar.testing.store_contract.made import TTL_US, Base, OpenStore, Run, charge, reserve, rule, settle


class Amounts(Base):
    """What is held and booked, whatever the time."""

    # -- reserve

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

    # -- settle and release

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

    # -- the same again

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

    def test_i6_a_charge_under_the_id_of_what_another_process_holds_is_a_conflict(
        self, open_store: OpenStore, store: Store, run: Run, clock: ManualClock
    ) -> None:
        """The answer to a reserve may be lost, and its call be charged since it went out all the same: it is billed once."""
        dollar = rule("b", 100)
        other = open_store(clock) if self.durable else store
        try:
            assert type(run(reserve("first", (dollar, 1), digest=""))) is Granted
            assert type(other.execute(reserve("a", (dollar, 60), digest=""))) is Granted
            assert run(charge("a", (dollar, 30), digest="")) == Rejected("conflict", "a")
            assert type(run(settle("a", 30))) is Ended
        finally:
            if other is not store:
                other.close()
        assert (self.account(store, dollar).spent, self.account(store, dollar).reserved) == (30, 1)

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

    # -- charges

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
