"""Kills: a process reserves and settles, and ends itself at a given point; whoever comes next finds whole books, and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from bursar.accounts import Rule
from bursar.commands import Ended, Granted, Reservation, Reserve, Settle
from bursar.policy import Policy
from bursar.scope import Scope
from bursar.stores.base import Store

HELD, COST = 3_000, 2_000
NEVER = 10**9


class Points:
    """Counts the points that a process passes, and ends it at one of them."""

    passed = 0
    last = NEVER

    @classmethod
    def hit(cls) -> int:
        cls.passed += 1
        if cls.passed == cls.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


def pair(policy: Policy, id: str, now_us: int) -> tuple[Reserve, Settle]:
    """A reservation on the policy's accounts, and its settlement."""
    rules = [one.rule for one in policy.match(Scope({"run": "r"}), ("USD", "slots"), now_us)]
    lines = tuple((rule, 1 if rule.unit == "slots" else HELD) for rule in rules)
    draft = {"path": ["r"], "tags": {"run": "r", "pair": id}, "cost_nanos": HELD, "usage": {}}
    return Reserve(id, lines, 600_000_000, draft, "d"), Settle(id, {"USD": COST}, COST, {"output_tokens": 5})


def killed_at(
    store: Store, commands: tuple[Reserve, Settle], last: int, watch: Callable[[], object]
) -> tuple[str, int]:
    """Carry the commands out in a child that dies at point `last`; what was acknowledged ("", "r", "rs"), points passed.

    The child has its parent's store, which opens a connection of its own after a fork; `watch` has points put into that.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Points.passed, Points.last = 0, last
            watch()
            for command, told in zip(commands, (b"r", b"s"), strict=True):
                store.execute(command)
                Points.hit()
                os.write(writing, told)
            Points.last = NEVER
            os.write(writing, b"%d" % Points.passed)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    acknowledged = "".join(letter for letter in told if letter.isalpha())
    return acknowledged, int(told.removeprefix(acknowledged) or 0)


class Survivor:
    """Who goes on after each kill. `store`: its own; every pair that was ended is on the books of `rules` before."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ended = 0

    def goes_on(self, commands: tuple[Reserve, Settle], acknowledged: str, *, at_work: bool = False) -> None:
        """The books are whole, what was acknowledged stands (I7), and the same commands come to the same end (I6).

        `at_work`: a server may still be busy with what the killed process has sent.
        """
        reserve, settle = commands
        state = self._state(reserve.id)
        assert state.startswith(acknowledged), f"I7: {acknowledged} was acknowledged, the books say {state}"
        if not at_work:
            self._balances(reserve, held=state == "r", settled=state == "rs")
        assert type(self.store.execute(reserve)) is Granted
        answer = self.store.execute(settle)
        assert type(answer) is Ended
        assert answer.again if state == "rs" else not answer.again or at_work
        self.ended += 1
        self._balances(reserve, held=False, settled=False)

    def _state(self, id: str) -> str:
        """What the store has of a pair: nothing, the reservation ("r"), or its settlement ("rs")."""
        held: list[Reservation] = list(self.store.reservations())
        if held:
            assert [one.id for one in held] == [id]
            return "r"
        return "rs" if any(entry.id == id for entry in self.store.entries({"pair": id})) else ""

    def _balances(self, reserve: Reserve, *, held: bool, settled: bool) -> None:
        """I2, I3: all accounts of the pair have moved, or none."""
        amounts: dict[str, tuple[Rule, int]] = {rule.key: (rule, amount) for rule, amount in reserve.lines}
        rows: list[Any] = list(self.store.accounts(amounts))
        assert len(rows) == (len(amounts) if rows else 0)
        for row in rows:
            rule, amount = amounts[row.rule.key]
            assert row.reserved == (amount if held else 0)
            assert row.spent == (0 if rule.unit == "slots" else (self.ended + settled) * COST)
