"""The law against an oracle that works out every balance anew from all that happened, on memory and SQLite at once.

Generated worlds: every kind of window, in zones and at times where clocks change; rates, slots, several units in one call;
amounts that look for the edge (what is left, one less, one more) and times that do (a window's end, a microsecond off).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import oracle
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import Key, Oracle, Spec

from bursar.accounts import ACTIONS, Account, Rule, age
from bursar.budget import Budget, Threshold
from bursar.commands import (
    Answer,
    Charge,
    Command,
    Draw,
    Drawn,
    Ended,
    Entry,
    Granted,
    Refused,
    Rejected,
    Release,
    Reserve,
    Settle,
    Stepped,
)
from bursar.policy import Policy
from bursar.records import UsageRecord
from bursar.scope import Scope
from bursar.stores.base import Store
from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore
from bursar.testing import ManualClock

RUNS = ("r1", "r2")
UNITS = ("USD", "tokens", "requests", "slots")
# times around which the clocks of a zone change, and around which months and years end
PLACES = [
    ("UTC", "2024-12-31T23:50"),
    ("Europe/Berlin", "2025-03-30T00:50"),
    ("Europe/Berlin", "2025-10-26T00:50"),
    ("Australia/Lord_Howe", "2025-04-05T14:45"),
    ("Australia/Lord_Howe", "2025-10-04T15:20"),
    ("America/Havana", "2025-03-09T04:50"),
    ("America/Havana", "2025-11-02T03:50"),
    ("America/Sao_Paulo", "2018-02-18T01:50"),
    ("America/St_Johns", "2010-11-07T02:29"),
    ("Asia/Kathmandu", "2025-03-31T18:10"),
]
WINDOWS = [
    "total", "minute", "hour", "day", "week", "month", "quarter", "year",
    "rolling 7s", "rolling 1m", "rolling 10m", "rolling 1d", "rolling 1m",
]  # fmt: skip
STOPS = ("ask", "block", "kill")
PARAMETERS = {
    "downgrade": {"models": {"a": "b"}},
    "clamp": {"max_output_tokens": 1},
    "throttle": {"rate": "1 calls/second"},
}
AMOUNTS = st.one_of(st.integers(0, 12), st.integers(0, 2_000))


MARKS = st.tuples(st.sampled_from([1, 10, 50, 50, 80, 99, 100]), st.sampled_from(ACTIONS))
LADDERS = st.one_of(
    st.just(()),
    st.lists(MARKS, max_size=4, unique=True).map(
        lambda marks: tuple(sorted(marks, key=lambda mark: (mark[0], ACTIONS.index(mark[1]))))
    ),
)


@st.composite
def specs(draw: st.DrawFn, zone: str) -> list[Spec]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        name, per_run, enforce = f"b{number}", draw(st.booleans()), draw(st.integers(0, 4)) > 0
        kind = draw(st.sampled_from(["window", "window", "rate", "slots"]))
        if kind == "slots":
            found.append(Spec(name, "slots", draw(st.integers(1, 3)), per_run=per_run, enforce=enforce))
        elif kind == "rate":
            unit, limit = draw(st.sampled_from([("requests", 7), ("tokens", 997), ("USD", 1_000)]))
            period_s = draw(st.sampled_from([1, 60, 3_600, 86_400]))
            found.append(Spec(name, unit, limit, period_s=period_s, per_run=per_run, enforce=enforce))
        else:
            unit = draw(st.sampled_from(["USD", "tokens", "requests"]))
            window, limit = draw(st.sampled_from(WINDOWS)), draw(st.integers(1, 3_000))
            marks = draw(LADDERS)
            found.append(Spec(name, unit, limit, window, zone, per_run=per_run, enforce=enforce, marks=marks))
    return found


def budget(spec: Spec) -> Budget:
    per = {1: "second", 60: "minute", 3_600: "hour", 86_400: "day"}
    amount = f"{spec.limit / 10**9:.9f}" if spec.unit == "USD" else str(spec.limit)
    rate = f"/{per[spec.period_s]}" if spec.period_s else ""
    return Budget(
        spec.name,
        f"{amount} {spec.unit}{rate}",
        window=spec.window,
        tz=spec.zone,
        per="run" if spec.per_run else (),
        mode="enforce" if spec.enforce else "shadow",
        thresholds=[Threshold(f"{at}%", action, **PARAMETERS.get(action, {})) for at, action in spec.marks],
    )


def key_of(rule: Rule | dict[str, Any]) -> Key:
    name, _, _, scope, start_us = json.loads(rule["account"] if isinstance(rule, dict) else rule.key)
    return name, scope.get("run", ""), start_us


class World(RuleBasedStateMachine):
    """One history, told to the memory store, to another one and to the oracle. Every step compares all three."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.folder = Path(tempfile.mkdtemp(prefix="bursar-law-"))
        self.memory = MemoryStore(self.clock)
        self.other = self.reopen()
        self.counted = 0
        self.kept: dict[str, Reserve] = {}

    def reopen(self) -> Store:
        """The other store, with what it held before."""
        return SqliteStore(self.folder / "law.db", durability="process", clock=self.clock)

    @initialize(data=st.data(), place=st.sampled_from(PLACES))
    def begin(self, data: st.DataObject, place: tuple[str, str]) -> None:
        zone, at = place
        self.clock.set(oracle.us(datetime.fromisoformat(at).replace(tzinfo=UTC)))
        self.oracle = Oracle(data.draw(specs(zone)))
        self.policy = Policy([budget(spec) for spec in self.oracle.specs])

    # -- what both stores are told ---------------------------------------------------------------------------------

    def now_us(self) -> int:
        return self.clock.now_us()

    def apply(self, command: Command) -> Answer:
        """What both stores answer; it must be the same."""
        answer = self.memory.execute(command)
        other = self.other.execute(command)
        assert answer == other
        return answer

    def matching(self, run: str, units: tuple[str, ...]) -> list[Rule]:
        scope = Scope({"run": run})
        return [one.rule for one in self.policy.match(scope, units, self.now_us())]

    def amounts(self, data: st.DataObject, run: str, units: tuple[str, ...] = UNITS) -> dict[str, int]:
        """Some amounts; one of them may be what is left somewhere, or one off it."""
        amounts = {unit: 1 if unit == "slots" else data.draw(AMOUNTS, label=unit) for unit in units}
        keys = [key for key, _ in self.oracle.lines(run, amounts, self.now_us()).items()]
        keys = [key for key in keys if self.oracle.spec(key).unit != "slots"]
        if keys and data.draw(st.booleans(), label="edge"):
            key = data.draw(st.sampled_from(sorted(keys)), label="at")
            edge = self.oracle.available(key, self.now_us()) + data.draw(st.integers(-1, 1), label="off")
            amounts[self.oracle.spec(key).unit] = max(0, edge)
        return amounts

    def draft(self, run: str, cost_nanos: int) -> dict[str, Any]:
        return {"path": [run], "tags": {"run": run}, "cost_nanos": cost_nanos, "usage": {}}

    @rule(
        data=st.data(),
        run=st.sampled_from(RUNS),
        ttl_s=st.sampled_from([1, 60, 5_000]),
        charge=st.booleans(),
        complies=st.booleans(),
    )
    def reserve(self, data: st.DataObject, run: str, ttl_s: int, charge: bool, complies: bool) -> None:
        self.counted += 1
        id = f"c{self.counted:04}"
        amounts, now_us, ttl_us = self.amounts(data, run), self.now_us(), ttl_s * 1_000_000
        lines = tuple((one, amounts[one.unit]) for one in self.matching(run, UNITS))
        on_expiry = "charge" if charge else "release"
        complied = {one.key: len(one.marks) for one, _ in lines} if complies else {}
        command = Reserve(id, lines, ttl_us, self.draft(run, amounts["USD"]), "d", on_expiry, complied=complied)
        acting = self.oracle.acts(run, amounts, now_us)
        if self.is_held_up(command, acting, complies=complies):
            return
        short = self.oracle.short(run, amounts, now_us) | {key for key in acting if not self.oracle.spec(key).enforce}
        refusing = self.oracle.reserve(id, run, amounts, now_us, ttl_us, charge=charge)
        answer = self.apply(command)
        if refusing:
            assert type(answer) is Refused
            assert answer.mark is None
            key = key_of(answer.account.rule)
            assert key in refusing
            assert answer.account.available == self.oracle.available(key, now_us)
            asked = self.oracle.lines(run, amounts, now_us)
            assert answer.retry_after_us == self.oracle.all_room_in_us(refusing, asked, now_us)
        else:
            assert type(answer) is Granted
            assert {key_of(one.rule) for one in answer.accounts if one.rule.key in answer.shadowed} == short
            self.kept[id] = command

    def is_held_up(self, command: Reserve, acting: dict[Key, list[int]], *, complies: bool) -> bool:
        """Whether a mark stops the call, or asks for a step that it has not taken; the law has to say the same."""
        enforced = {key: held for key, held in acting.items() if self.oracle.spec(key).enforce}
        stops = {
            key: [index for index in held if self.oracle.spec(key).marks[index][1] in STOPS]
            for key, held in enforced.items()
        }
        if any(stops.values()):
            answer = self.apply(command)
            assert type(answer) is Refused
            assert answer.mark == stops[key_of(answer.account.rule)][0]
            return True
        if enforced and not complies:
            answer = self.apply(command)
            assert type(answer) is Stepped
            assert {
                key_of(next(one for one, _ in command.lines if one.key == key)): rung
                for key, rung in answer.marks.items()
            } == {key: held[-1] + 1 for key, held in enforced.items()}
            return True
        return False

    def ids(self, *states: str) -> list[str]:
        return [id for id, held in self.oracle.reservations.items() if held.state in states]

    @precondition(lambda self: self.ids("open", "expired"))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.ids("open", "expired")), label="id")
        held = self.oracle.reservations[id]
        actuals = {}
        for unit in ("USD", "tokens", "requests"):
            edge = held.amounts[unit] + data.draw(st.integers(-1, 1))
            if unit == "USD" or data.draw(st.booleans()):
                actuals[unit] = max(0, data.draw(st.one_of(AMOUNTS, st.just(edge)), label=unit))
        command = Settle(id, actuals, actuals["USD"], {"output_tokens": actuals.get("tokens", 0)})
        self.oracle.settle(id, actuals, self.now_us())
        assert type(self.apply(command)) is Ended
        again = self.apply(command)
        assert type(again) is Ended
        assert again.again

    @precondition(lambda self: self.ids("open", "expired"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.ids("open", "expired")), label="id")
        self.oracle.release(id, self.now_us())
        assert type(self.apply(Release(id))) is Ended

    @precondition(lambda self: self.ids("settled", "released", "corrected", "reversed"))
    @rule(data=st.data())
    def end_again(self, data: st.DataObject) -> None:
        """I5: what has ended does not end in another way; I6: a granted command may be repeated."""
        id = data.draw(st.sampled_from(self.ids("settled", "released", "corrected", "reversed")), label="id")
        state = self.oracle.reservations[id].state
        answer = self.apply(Release(id))
        assert type(answer) is (Ended if state in ("released", "reversed") else Rejected)
        answer = self.apply(Settle(id, {"USD": 10**6}, 10**6, {}))
        assert type(answer) is Rejected
        assert type(self.apply(self.kept[id])) is Granted

    @rule(data=st.data(), run=st.sampled_from(RUNS))
    def charge(self, data: st.DataObject, run: str) -> None:
        self.counted += 1
        id, amounts = f"c{self.counted:04}", self.amounts(data, run, ("USD",))
        lines = tuple((one, amounts["USD"]) for one in self.matching(run, ("USD",)))
        self.oracle.charge(id, run, amounts, self.now_us())
        command = Charge(id, lines, amounts["USD"], {}, self.draft(run, amounts["USD"]), "d")
        assert type(self.apply(command)) is Ended
        again = self.apply(command)
        assert type(again) is Ended
        assert again.again

    @precondition(lambda self: self.oracle.reservations)
    @rule(data=st.data(), number=st.integers(1, 3), now=st.booleans())
    def draw(self, data: st.DataObject, number: int, now: bool) -> None:
        """What a reservation's holder has spent of it by itself, in the windows of its begin or in those of now."""
        id = data.draw(st.sampled_from(sorted(self.oracle.reservations)), label="id")
        held = self.oracle.reservations[id]
        lines = self.matching(held.run, UNITS) if now else [one for one, _ in self.kept[id].lines]
        rules = tuple(one for one in lines if one.kind == "window")
        if not rules:
            return
        entries, spent = [], {}
        for _ in range(number):
            self.counted += 1
            units = {unit: data.draw(st.one_of(AMOUNTS, st.integers(-12, 0)), label=unit) for unit in UNITS}
            amounts = {one.key: units[one.unit] for one in rules}
            entry = self.entry(f"c{self.counted:04}", held.run, amounts)
            entries.append(entry)
            spent[entry.id] = {key_of(one): amounts[one.key] for one in rules}
        still_open = held.state == "open"
        overruns = {one.key: data.draw(st.sampled_from([0, 0, 5]), label="overrun") for one in rules}
        self.oracle.draw(id, spent, {key_of(one): overruns[one.key] for one in rules}, self.now_us())
        command = Draw(id, rules, tuple(entries), overruns)
        answer = self.apply(command)
        assert type(answer) is Drawn
        assert answer.new == number
        assert (answer.left is not None) is still_open
        again = self.apply(command)
        assert type(again) is Drawn
        assert (again.new, again.left, again.accounts) == (0, answer.left, answer.accounts)
        other = command._replace(entries=(*entries, entries[0]._replace(reason="another")))
        assert self.apply(other) == Rejected("conflict", entries[0].id)

    def entry(self, id: str, run: str, amounts: dict[str, int]) -> Entry:
        now_us, draft = self.now_us(), self.draft(run, 0)
        return Entry(
            id, "settlement", None, "completed", False, "", 7, {}, amounts, now_us, now_us, "", draft, {"tab": "\t\\"}
        )

    @rule()
    def sweep(self) -> None:
        expected = self.oracle.sweep(self.now_us())
        assert self.memory.sweep() == self.other.sweep() == expected

    @rule(us=st.one_of(st.integers(0, 10), st.integers(0, 10**8), st.integers(0, 10**11)))
    def wait(self, us: int) -> None:
        self.clock.advance(us=us)

    @rule(data=st.data(), off=st.integers(-1, 1))
    def wait_for_an_edge(self, data: st.DataObject, off: int) -> None:
        """To where something changes by itself: a window's end, an expiry, a bucket leaving, a rate's next unit."""
        now_us = self.now_us()
        edges = {window[1] for spec in self.oracle.specs if (window := self.window(spec))[1] is not None}
        edges |= {held.expires_us for held in self.oracle.reservations.values() if held.state == "open"}
        for key in self.oracle.touched:
            left = self.oracle.room_in_us(key, self.oracle.available(key, now_us) + 1, now_us)
            edges |= set() if left is None else {now_us + left}
        for move in self.oracle.moves:
            length_us = self.oracle.spec(move.key).rolling_us
            if length_us:
                leaves_us = self.oracle.leaves(move, self.oracle.spec(move.key))
                edges |= {leaves_us, leaves_us - length_us, leaves_us - length_us // 120}
        later = sorted(edge for edge in edges if edge + off > now_us)
        if later:
            self.clock.set(data.draw(st.sampled_from(later), label="edge") + off)

    def window(self, spec: Spec) -> tuple[int, int | None]:
        return oracle.window_at(spec.window, spec.zone, self.now_us())

    @rule()
    def open_again(self) -> None:
        self.other.close()
        self.other = self.reopen()

    # -- what must hold after every step ---------------------------------------------------------------------------

    @invariant()
    def the_books_are_what_happened(self) -> None:
        if not hasattr(self, "oracle"):
            return
        accounts = {account.rule.key: account for account in self.memory.accounts()}
        assert {account.rule.key: account for account in self.other.accounts()} == accounts
        found = {key_of(account.rule): account for account in accounts.values()}
        assert self.oracle.touched <= set(found)
        for key, account in found.items():
            self.check(key, age(account, self.now_us()))
        told = [(*key_of(alert.facts), alert.facts["mark"]) for alert, _ in self.memory.alerts()]
        assert sorted(told) == sorted((*key, index) for key, index in self.oracle.told)
        assert [alert for alert, _ in self.other.alerts()] == [alert for alert, _ in self.memory.alerts()]
        open_ones = len(self.ids("open"))
        assert self.memory.open_reservations() == self.other.open_reservations() == open_ones

    def check(self, key: Key, account: Account) -> None:
        known, now_us, spec = self.oracle, self.now_us(), self.oracle.spec(key)
        assert account.reserved == known.reserved(key), "I2"
        assert account.overrun == known.overrun(key)
        assert account.available == known.available(key, now_us)
        if spec.period_s:
            exact = known.level(key, now_us)
            assert account.level * spec.period_s * 10**6 + account.remainder == exact * spec.period_s * 10**6
        else:
            assert account.spent == known.spent(key, now_us), "I3"
            if spec.enforce:
                assert account.spent + account.reserved <= spec.limit + account.overrun, "I1"

    def teardown(self) -> None:
        try:
            if hasattr(self, "oracle"):
                self.records_alone_rebuild_every_balance()
        finally:
            self.memory.close()
            self.other.close()
            shutil.rmtree(self.folder)

    def records_alone_rebuild_every_balance(self) -> None:
        """I10, I4: one record per end, no more; their sums are what the accounts say."""
        entries = list(self.other.entries())
        assert entries == list(self.memory.entries())
        ends = sorted((entry.kind, entry.corrects or entry.id) for entry in entries if entry.kind != "refusal")
        assert ends == sorted(self.oracle.ended)
        moved: dict[str, list[tuple[int, int]]] = {}
        for record in map(UsageRecord.of, entries):
            for amount in record.amounts:
                key = next(key for key in self.names() if self.is_named(key, amount))
                moved.setdefault(key, []).append((oracle.us(record.reserved_at), amount["amount"]))
        for account in self.other.accounts():
            booked = moved.get(account.rule.key, [])
            if account.rule.kind != "rolling":
                assert account.spent == sum(amount for _, amount in booked)
            else:
                width_us = account.rule.period_us // 60
                for index, total in account.buckets:
                    assert total == sum(amount for at_us, amount in booked if at_us // width_us == index)

    def names(self) -> list[str]:
        return [account.rule.key for account in self.other.accounts()]

    @staticmethod
    def is_named(key: str, amount: dict[str, Any]) -> bool:
        budget, unit, _, scope, start_us = json.loads(key)
        return (budget, unit, scope, start_us) == tuple(
            amount[name] for name in ("budget", "unit", "scope", "window_start")
        )


TestLaw = World.TestCase
TestLaw.settings = settings(stateful_step_count=40, max_examples=2 * settings().max_examples)
