"""The Redis store: budgets shared by the processes of many hosts, one script call per command or batch of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic_core import from_json

from bursar.clock import Clock, StoreClock
from bursar.commands import (
    Answer,
    Command,
    Draw,
    Ended,
    Rejected,
)
from bursar.errors import StoreError
from bursar.law import OPERATOR_KEY, decide
from bursar.stores import forks
from bursar.stores.base import expire_all
from bursar.stores.group_commit import GroupCommit
from bursar.stores.redis.faults import fault_of
from bursar.stores.redis.keys import MAX_TURNS, RedisKeys
from bursar.stores.redis.scripts import LAW
from bursar.stores.redis.server import durability_of
from bursar.stores.server_clock import ServerClock

SWEEP_BATCH = 500
MAX_BATCH = 64  # commands of one call: nobody else is served while it runs
LAYOUT = 2  # of keys and fields; main.lua writes it down


class RedisStore(RedisKeys):
    """Budgets on a Redis server or cluster, in keys that begin with `bursar{ORG}:` (`?org=`, by default "bursar").

    In a cluster without `?org=` each organisation has a slot of its own, and every budget has `org` among its `per`. The
    server's clock decides; with `clock` (for tests and simulations), that one. `durability` is what the server is set to: `full`
    (a settlement is on its disk before it is acknowledged), `everysec`, `memory` or `unknown`. Raises StoreError (unreachable,
    locked, full, readonly, loading, denied, evicts, damaged, newer, older, clock).
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        super().__init__(url)
        try:
            self.durability = durability_of(self.server.settings())
            layout = int(self.server.ask("HGET", f"{self.slots.policy}policy", "layout") or LAYOUT)
            if layout != LAYOUT:
                raise _of_another_version(layout)
            times = self.server.many(("HGET", f"{slot}policy", "clock") for slot in self.slots.all())
            last = max((int(time) for time in times if time), default=0)
            self._clock = None if clock is not None else ServerClock(self._ask_time, last)
            given = StoreClock(clock, last) if clock is not None else self._clock
            assert given is not None
            self.now_us = given.now_us
        except BaseException:
            self.server.close()
            raise
        self._commits = GroupCommit(self._apply)
        forks.watch(self)

    def execute(self, command: Command) -> Answer:
        return self._commits.run(command)

    async def aexecute(self, command: Command) -> Answer:
        return await self._commits.arun(command)

    def post(self, command: Command) -> None:
        self._commits.post(command)

    # -- commands

    def _apply(self, commands: Sequence[Command], _first_time: bool) -> list[Answer | BaseException]:
        """One call for the commands of a slot. It may be made again: a command that comes twice gets the same answer (I6)."""
        if len(commands) == 1 and not self.slots.by_org:
            return self._apply_some(self.slots.policy, commands)
        answers: dict[int, Answer | BaseException] = {}
        by_slot: dict[str, list[int]] = {}
        for number, command in enumerate(commands):
            try:
                by_slot.setdefault(self.slots.of(command), []).append(number)
            except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
                answers[number] = error
        for slot, numbers in by_slot.items():
            for start in range(0, len(numbers), MAX_BATCH):
                some = numbers[start : start + MAX_BATCH]
                told = self._apply_some(slot, [commands[number] for number in some])
                answers |= zip(some, told, strict=True)
        return [answers[number] for number in range(len(commands))]

    def _apply_some(self, slot: str, commands: Sequence[Command]) -> list[Answer | BaseException]:
        try:
            told = self._call(slot, [(command.id, self._wire.text(command)) for command in commands])
        except Exception as error:  # noqa: BLE001 - as above
            return [error for _ in commands]
        return [self._answer(slot, *one) for one in zip(commands, told, strict=True)]

    def _answer(self, slot: str, command: Command, told: Sequence[Any]) -> Answer | BaseException:
        """What the server has told, or what the law says of the row that it found.

        An entry does not change any more, nor does what an open reservation will book when it expires: so the law may say here
        what follows from them. The server writes it, if the row is still in that state.
        """
        try:
            for _ in range(MAX_TURNS):
                if told[0] == "failed":
                    return fault_of(told[1])
                if told[0] == "known":
                    assert type(command) is Draw
                    rest = self._wire.undrawn(command, told)
                    if type(rest) is Rejected:
                        return rest
                    assert type(rest) is Draw
                    command = rest
                    (told,) = self._call(slot, [(command.id, self._wire.text(command))])
                    continue
                if told[0] != "found":
                    return self._wire.answer(command, told)
                now_us, found = self._wire.rows(command, told)
                answer, puts = decide(found.get, command, now_us)
                if not puts:
                    return answer
                assert type(answer) is Ended
                operator = found.get(OPERATOR_KEY)
                text = self._wire.text(command, answer.entry, operator if type(operator) is str else None)
                (told,) = self._call(slot, [(command.id, text)])
        except Exception as error:  # noqa: BLE001 - the answers to the others of its batch stand
            return error
        raise AssertionError("unreachable")

    def _call(self, slot: str, commands: Sequence[tuple[str, str]]) -> list[Any]:
        """One call of the law for commands, each its id and its text."""
        if self._clock is None:
            given_us, seen_us = str(self.now_us()), "0"
        else:
            self._clock.check()
            given_us, seen_us = "", str(self._clock.seen_us)
        texts = [text for command in commands for text in command]
        run = partial(self.server.run, LAW, slot, given_us, seen_us, "1" if self.slots.by_org else "", *texts)
        told = from_json(run())
        if told[0] == "join":  # the slot has lost what it knew
            self.slots.join(slot)
            told = from_json(run())
        now_us = _time(told)
        if told[1][0] == "failed" and "READONLY" in told[1][1]:  # another server may have become the primary
            self.server.reconnect()
            told = from_json(run())
        if self._clock is not None:
            self._clock.learn(now_us)
        answers: list[Any] = told[1:]
        return answers

    def _ask_time(self) -> int:
        return _time(from_json(self.server.run(LAW, self.slots.policy, "", "0", "")))

    def sweep(self) -> int:
        slots = self.slots.all()
        wanted = (f"ZRANGEBYSCORE {slot}due -inf {self.now_us()} LIMIT 0 {SWEEP_BATCH}".split() for slot in slots)
        found = zip(slots, self.server.many(wanted), strict=True)
        return expire_all(self, self._remembered((slot, id.decode()) for slot, ids in found for id in ids))

    def _remembered(self, found: Iterable[tuple[str, str]]) -> Iterator[str]:
        for slot, id in found:
            self.slots.remember(f"i:{id}", slot)
            yield id

    def close(self) -> None:
        self._commits.close()
        self.server.close()

    # A connection must not cross a fork: both sides would speak on one socket.

    def before_fork(self) -> None:
        self.server.using.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        self.server.using.release()
        if in_child:
            _inherited.append(self.server.leave())
            self._commits = GroupCommit(self._apply)  # the parent's callers and its worker do not exist here


def _time(told: Sequence[Any]) -> int:
    """The time in front of an answer of the law."""
    if told[0] == "clock":
        raise StoreError(
            f"The server's clock is {told[1]} s behind the store's. Set the clock (NTP), then try again.",
            fault="clock",
        )
    return int(told[0])


_inherited: list[Any] = []  # a parent's, kept for ever: closing one here would end it there


def _of_another_version(layout: int) -> StoreError:
    if layout > LAYOUT:
        return StoreError(
            f"The keys of this store were written by a newer Bursar (layout {layout}). Upgrade Bursar to open it.",
            fault="newer",
        )
    return StoreError(
        f"The keys of this store were written by an earlier Bursar (layout {layout}). Let that version drain its records "
        "(bursar drain), then give this one a database of its own.",
        fault="older",
    )
