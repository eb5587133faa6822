"""The Redis store: budgets shared by the processes of many hosts, one script call per command or batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic_core import from_json

from bursar.accounts import Account
from bursar.clock import Clock, StoreClock
from bursar.commands import (
    Alert,
    Answer,
    Command,
    Definition,
    Definitions,
    Draw,
    Ended,
    Entry,
    Rejected,
    Reservation,
)
from bursar.errors import StoreError
from bursar.law import OPERATOR_KEY, decide
from bursar.signing import changes, operator_of
from bursar.stores import forks
from bursar.stores.base import expire_all
from bursar.stores.group_commit import GroupCommit
from bursar.stores.pruning import LATE_US, Pruned
from bursar.stores.redis.faults import fault_of
from bursar.stores.redis.retiring import forget_alerts, retire
from bursar.stores.redis.scripts import CLAIM, LAW, PUBLISH
from bursar.stores.redis.server import Server, durability_of
from bursar.stores.redis.slots import Slots, check_budgets
from bursar.stores.redis.wire import Wire, alert_of, fields_of, row_of
from bursar.stores.retiring import granted
from bursar.stores.server_clock import ServerClock
from bursar.stores.sqlite_rows import PAGE, dumps

SWEEP_BATCH = 500
MAX_BATCH = 64  # commands of one call: nobody else is served while it runs
LAYOUT = 2  # of keys and fields; main.lua writes it down
MAX_TURNS = 100  # of somebody whom others are always ahead of


_T = TypeVar("_T")


class RedisStore:
    """Budgets on a Redis server or cluster, in keys that begin with `bursar{ORG}:` (`?org=`, by default "bursar").

    In a cluster without `?org=` each organisation has a slot of its own, and every budget has `org` among its `per`. The
    server's clock decides; with `clock` (for tests and simulations), that one. `durability` is what the server is set to: `full`
    (a settlement is on its disk before it is acknowledged), `everysec`, `memory` or `unknown`. Raises StoreError (unreachable,
    locked, full, readonly, loading, denied, evicts, damaged, newer, older, clock).
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self._wire = Wire()
        self.server = Server(url)
        self.slots = Slots(self.server)
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

    # -- definitions

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """By one process at a time: who finds that another was faster looks again. What is the newest already is left alone."""
        if kind == "budget" and self.slots.by_org:
            check_budgets(definitions)
        fields = [_field(kind, name) for name in definitions]
        for _ in range(MAX_TURNS):
            version = self.version()
            held = self._held([*fields, _field("operator", "operator")])
            found = changes(kind, definitions, held)
            if not found:
                return version
            new = {name: Definition(version + 1 + number, one) for number, (name, one) in enumerate(found.items())}
            last = version + len(new)
            operator = operator_of({**held, kind: {**held.get(kind, {}), **new}}) or ""
            texts = [text for name, one in new.items() for text in (_field(kind, name), dumps(one))]
            arguments = (str(version), str(last), operator, *texts)
            if self.server.run(PUBLISH, self.slots.policy, *arguments):
                return self.version()
        raise StoreError("Others publish all the time. Try again.", fault="locked")

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        """The policy's version, and the newest definition of everything that was defined after version `since`."""
        version = self.version()
        newer = self.server.ask("ZRANGEBYSCORE", f"{self.slots.policy}versions", f"({since}", "+inf")
        held = self._held([field.decode() for field in newer])
        newest = max((one.version for named in held.values() for one in named.values()), default=0)
        return max(version, newest), held

    def _held(self, fields: Sequence[str]) -> Definitions:
        held: Definitions = {}
        told = self.server.ask("HMGET", f"{self.slots.policy}definitions", *fields) if fields else []
        for field, text in zip(fields, told, strict=True):
            if text is not None:
                kind, name = from_json(field)
                held.setdefault(kind, {})[name] = Definition(*from_json(text))
        return held

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        told = self.server.ask("LRANGE", f"{self.slots.policy}history", "0", "-1")
        for field, text in zip(told[::2], told[1::2], strict=True):
            (kind, name), (version, definition) = from_json(field), from_json(text)
            yield version, kind, name, definition

    def version(self) -> int:
        return self.slots.version()

    # -- the outbox

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        now_us, slots = self.now_us(), self.slots.all()
        due = self.server.many(f"ZRANGEBYSCORE {slot}outbox -inf {now_us} LIMIT 0 1".split() for slot in slots)
        found: list[tuple[Alert, int]] = []
        for slot in (slot for slot, ids in zip(slots, due, strict=True) if ids):
            arguments = (str(now_us), str(now_us + lease_us), str(limit - len(found)))
            for id, claims, flat in self.server.run(CLAIM, slot, *arguments):
                self.slots.remember(f"t:{id.decode()}", slot)
                found.append((alert_of(id.decode(), fields_of(dict(zip(flat[::2], flat[1::2], strict=True)))), claims))
        return sorted(found, key=lambda one: (one[0].at_us, one[0].id))

    def delivered(self, ids: Iterable[str]) -> None:
        self._outbox(("ZREM", id) for id in ids)

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self._outbox(("ZADD", "XX", str(at_us), id) for id in ids)

    def _outbox(self, commands: Iterable[Sequence[str]]) -> None:
        for name, *arguments in commands:
            slot = self.slots.home(f"t:{arguments[-1]}")
            self.server.ask(name, f"{slot}outbox", *arguments)

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        found = []
        for slot in self.slots.all():
            waiting = {id.decode() for id in self.server.ask("ZRANGE", f"{slot}outbox", "0", "-1")}
            for alert in self._rows(slot, "t:", self.server.ask("ZRANGE", f"{slot}alerts", "0", "-1"), alert_of):
                found.append((alert, alert.id not in waiting))
        return iter(sorted(found, key=lambda one: (one[0].at_us, one[0].id)))

    # -- reading

    def reservations(self) -> Iterator[Reservation]:
        slots = self.slots.all()
        found = [
            row
            for slot in slots
            for row in self._rows(slot, "i:", self.server.ask("ZRANGE", f"{slot}due", "0", "-1"), row_of)
        ]
        return iter(sorted(row for row in found if type(row) is Reservation))

    def open_reservations(self) -> int:
        return sum(self.server.many(("ZCARD", f"{slot}due") for slot in self.slots.all()))

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        if keys is None:
            wanted = [
                (slot, key)
                for slot in self.slots.all()
                for key in sorted(key.decode() for key in self.server.ask("SMEMBERS", f"{slot}accounts"))
            ]
        else:
            wanted = [(self.slots.of_account(key), key) for key in keys]
        rows = self.server.many(("MGET", f"{slot}r:{key}", f"{slot}a:{key}") for slot, key in wanted)
        return iter([self._wire.stored_account(*row) for row in rows if None not in row])

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        """Those that have not been drained. All ids are read first, since they come in the order of time."""
        wanted = dict(tags or {}).items()
        ids = sorted((id, slot) for slot in self.slots.all() for id in self._ended(slot))
        for start in range(0, len(ids), PAGE):
            page = ids[start : start + PAGE]
            rows = self.server.many(("HGETALL", f"{slot}i:{id}") for id, slot in page)
            for (id, _), row in zip(page, rows, strict=True):
                entry = row_of(id, fields_of(row)) if row else None
                if type(entry) is Entry and wanted <= entry.draft["tags"].items():
                    yield entry

    def _ended(self, slot: str) -> Iterator[str]:
        """The ids in a slot's stream of records."""
        after = "-"
        while True:
            page = self.server.ask("XRANGE", f"{slot}records", after, "+", "COUNT", str(PAGE))
            for _, fields in page:
                yield fields[b"id"].decode()
            if len(page) < PAGE:
                return
            after = f"({page[-1][0].decode()}"

    def _rows(
        self, slot: str, kind: str, ids: Sequence[bytes], made: Callable[[str, Mapping[str, str]], _T]
    ) -> list[_T]:
        names = [id.decode() for id in ids]
        rows = self.server.many(("HGETALL", f"{slot}{kind}{name}") for name in names)
        return [made(name, fields_of(row)) for name, row in zip(names, rows, strict=True) if row]

    def prune(self, before_us: int, facts: Mapping[str, Any]) -> Pruned:
        """Retire accounts, and forget alerts: records are drained, and pruned where they went."""
        now_us = self.now_us()
        rests_us = min(before_us, now_us - 2 * LATE_US)  # until LATE_US after the drain an expiry may be corrected
        more = granted(self.definitions()[1], now_us)
        for slot in self.slots.all():
            forget_alerts(self.server, slot, rests_us)
        return Pruned(accounts=sum(retire(self.server, slot, more, rests_us, now_us) for slot in self.slots.all()))

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


def _field(kind: str, name: str) -> str:
    return dumps((kind, name))


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
