"""Generated histories of several processes with leases: crashes, lost answers, lost journals, expiries, newer policies.

What must hold: limits at every step (I1), and, once all is over, that every settlement that was answered is on the books once,
that nothing is held (I9), and that everything else that was booked is marked `estimated`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_leases import CALL, Process, Shared
from test_leases import rule as account_rule

from bursar.accounts import Rule
from bursar.audit import audit
from bursar.commands import Ended, Granted, Rejected, Release
from bursar.errors import StoreError
from bursar.stores.leases import recover
from bursar.stores.leases.tender import TTL_US
from bursar.stores.memory import MemoryStore
from bursar.testing import ManualClock

LIMIT = 100_000
OPEN_US = 600_000_000  # the time to live of a call


class World(RuleBasedStateMachine):
    """Up to four processes on one shared store; each may be in the middle of calls when something happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.shared = Shared(self.clock)
        self.folder = Path(tempfile.mkdtemp(prefix="bursar-leases-"))
        self.processes: list[Process] = []
        self.open: dict[int, list[str]] = {}
        self.answered: dict[str, int] = {}  # what each answered settlement has cost
        self.tried: set[str] = set()  # the calls whose settlement was sent, answered or not
        self.lost: set[str] = set()  # the answered ones whose journal was lost with its host
        self.limit = LIMIT

    @initialize()
    def begin(self) -> None:
        self.start()
        self.start()

    @precondition(lambda self: len(self.processes) < 4)
    @rule()
    def start(self) -> None:
        process = Process(self.shared, self.folder, account_rule(limit=self.limit), account_rule("team", self.limit))
        process.version = MemoryStore.version(self.shared)
        self.processes.append(process)
        self.open[id(process)] = []

    def any(self, data: st.DataObject) -> Process:
        return data.draw(st.sampled_from(self.processes), label="process")

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), calls=st.integers(1, 40), cost=st.integers(0, 2 * CALL), leave_open=st.integers(0, 3))
    def work(self, data: st.DataObject, calls: int, cost: int, leave_open: int) -> None:
        process = self.any(data)
        try:
            for number in range(calls):
                answer = process.reserve()
                if type(answer) is Rejected:
                    process.version, process.rules = MemoryStore.version(self.shared), self.limits()
                elif type(answer) is Granted:
                    self.open[id(process)].append(process.last)
                    if number >= leave_open:
                        self.settle(process, process.last, cost)
        except StoreError:
            assert self.shared.cut

    def settle(self, process: Process, call: str, cost: int) -> None:
        self.tried.add(call)
        answer = process.settle(call, cost)
        if type(answer) is Ended:
            self.open[id(process)].remove(call)
            self.answered[call] = cost

    def limits(self) -> tuple[Rule, ...]:
        return account_rule(limit=self.limit), account_rule("team", self.limit)

    @precondition(lambda self: any(self.open.get(id(one)) for one in self.processes))
    @rule(data=st.data(), cost=st.integers(0, 2 * CALL), release=st.booleans())
    def end_one(self, data: st.DataObject, cost: int, release: bool) -> None:
        process = data.draw(st.sampled_from([one for one in self.processes if self.open[id(one)]]), label="process")
        call = data.draw(st.sampled_from(self.open[id(process)]), label="call")
        try:
            if not release:
                self.settle(process, call, cost)
            elif type(process.store.execute(Release(call))) is Ended:
                self.open[id(process)].remove(call)
                self.answered[call] = 0
        except StoreError:
            assert self.shared.cut

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def tend(self, data: st.DataObject) -> None:
        try:
            self.any(data).store.tend()
        except StoreError:
            assert self.shared.cut

    @rule(seconds=st.sampled_from([0.1, 0.5, 1, 4, TTL_US / 3e6, TTL_US / 1e6, OPEN_US / 1e6]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        if not self.shared.cut:
            self.shared.sweep()

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def sweep_in_a_process(self, data: st.DataObject) -> None:
        if not self.shared.cut:
            self.any(data).store.sweep()

    @rule(cut=st.sampled_from(["", "", "before", "after"]))
    def cut_the_store_off(self, cut: str) -> None:
        self.shared.cut = cut

    @rule(part=st.integers(1, 4))
    def publish(self, part: int) -> None:
        """A policy with a higher limit: processes that have the old one are told."""
        if not self.shared.cut:
            self.limit += part * CALL
            self.shared.publish({"org": {"name": "org", "limit": f"{self.limit} USD"}})

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), journal_lost=st.booleans())
    def die(self, data: st.DataObject, journal_lost: bool) -> None:
        process = self.any(data)
        process.die()
        self.processes.remove(process)
        journal = process.store._tender.books.journal
        if journal_lost and journal is not None:
            self.lost |= {
                entry.id for lease in process.store._tender.books.leases.values() for entry in lease.unsent.values()
            }
            journal.path.unlink()

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        process = self.any(data)
        process.store.close()
        self.shared._closed = False
        self.processes.remove(process)

    @rule()
    def recover(self) -> None:
        try:
            recover(self.shared, self.folder)
        except StoreError:
            assert self.shared.cut

    @invariant()
    def no_limit_is_passed(self) -> None:
        for account in self.shared.accounts():
            assert account.spent + account.reserved <= account.rule.limit + account.overrun, "I1"

    def teardown(self) -> None:
        try:
            self.all_is_over()
        finally:
            shutil.rmtree(self.folder)

    def all_is_over(self) -> None:
        self.shared.cut = ""
        for process in self.processes:
            process.store.sweep()
            process.store.tend()
            process.store.close()
            self.shared._closed = False
        recover(self.shared, self.folder)
        assert not list(self.folder.glob("*.journal"))
        self.clock.advance(us=max(OPEN_US, TTL_US))
        self.shared.sweep()
        assert self.shared.open_reservations() == 0, "I9"
        assert audit(self.shared) == []
        cost: dict[str, int] = {}
        known: dict[str, bool] = {}
        for entry in self.shared.entries():
            call = entry.corrects or entry.id
            cost[call] = cost.get(call, 0) + entry.cost_nanos
            known[call] = known.get(call, False) or not entry.estimated
        for call, paid in self.answered.items():
            if call not in self.lost:
                assert cost.get(call) == paid, "I7, I10: an answered settlement is on the books, once"
        calls = {call for call in cost if "run" in self.tags_of(call)}
        for call in calls - self.tried:
            assert not known[call] or cost[call] == 0, "what nobody has settled is estimated"
        for account in self.shared.accounts():
            assert account.reserved == 0
            assert account.spent == sum(entry.amounts.get(account.rule.key, 0) for entry in self.shared.entries())
            assert account.spent >= sum(paid for call, paid in self.answered.items() if call not in self.lost)

    def tags_of(self, call: str) -> dict[str, str]:
        return next((entry.draft["tags"] for entry in self.shared.entries() if entry.id == call), {})


TestLeases = World.TestCase
TestLeases.settings = settings(stateful_step_count=30, max_examples=settings().max_examples // 2)
