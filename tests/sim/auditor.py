"""The auditor: what the store must answer to every command, and how it must stand afterwards, worked out from what happened alone.

It sees each command as it reaches the store, the answer and the time; it knows nothing of the law. Whatever is not as it must
be is a `Broken`, which names the invariant of the design.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bursar.commands import (
    Answer,
    Charge,
    Command,
    Draw,
    Expire,
    Extend,
    Granted,
    Refused,
    Rejected,
    Release,
    Reserve,
    Settle,
    Stepped,
    Tell,
    Told,
)
from sim.books import Broken, Held
from sim.ends import Ends
from sim.stands import STOPPING, Spec, Stand


class Auditor(Ends):
    """Audits one store. `rows`: how it reads the accounts that a command has touched; `ops`: how many commands it has seen."""

    def __init__(self, rows: Callable[[Iterable[str]], Iterable[Any]]) -> None:
        super().__init__()
        self.ops = 0
        self._rows = rows
        self._judges: dict[type, Callable[[Any, Any, int], Iterable[str]]] = {
            Reserve: self._reserve,
            Settle: self._settle,
            Release: self._release,
            Extend: self._extend,
            Expire: self._expire,
            Charge: self._charge,
            Draw: self._draw,
            Tell: self._tell,
        }

    def snapshot(self) -> bytes:
        return pickle.dumps(self.books)

    def restore(self, snapshot: bytes) -> None:
        self.books = pickle.loads(snapshot)

    def published(self, kind: str, definitions: Mapping[str, dict[str, Any]], version: int) -> None:
        if version < self.books.version:
            raise Broken(f"I8: the policy's version ran back from {self.books.version} to {version}")
        self.books.version = version
        if kind == "budget":
            for name, one in definitions.items():
                self.books.specs[name] = spec = Spec(one)
                self.books.earlier.setdefault(name, []).append((version, spec))

    def observe(self, command: Command, answer: Answer, now_us: int) -> None:
        """Hold one answer, and the accounts that it is about, against what they must be."""
        self.ops += 1
        books = self.books
        if now_us < books.now_us:
            raise Broken(f"I8: the store's time ran back from {books.now_us} to {now_us}")
        books.now_us = now_us
        touched = self._judges[type(command)](command, answer, now_us)
        found = 0
        for row in self._rows(touched):
            found += 1
            stand = books.stands.get(row.rule.key)
            if stand is None:
                raise Broken(f"I2: nobody has made the account {row.rule.key}")
            difference = stand.differs(row)
            if difference:
                raise Broken(f"{difference}, after {command}")
            if stand.spec.enforce and not stand.spec.rate_us and stand.spent + stand.held > stand.top + stand.overrun:
                raise Broken(f"I1: {row.rule.key} has passed its limit, after {command}")
        if found != sum(key in books.stands for key in touched):
            raise Broken(f"I2: an account of {command} is lost")

    # -- begins

    def _reserve(self, command: Reserve, answer: Answer, now_us: int) -> Iterable[str]:
        books = self.books
        known = books.calls.get(command.id)
        if known is not None or command.id in books.entries:
            same = known is not None and known.digest == command.digest and known.state != "charge"
            self._expect(command, answer, Granted if same else Rejected, "" if same else "conflict")
            if same and known is not None and answer.reservation.reserved_us != known.at_us:  # type: ignore[union-attr]
                raise Broken(f"I6: {command.id} was granted at {known.at_us}, repeated it is {answer}")
            return known.amounts if known is not None else ()
        if command.version < books.version:
            self._expect(command, answer, Rejected, "stale")
            return ()
        new: dict[str, int] = {}
        for rule, _ in command.lines:
            spec = books.specs[rule.budget]
            if rule.end_us is not None and rule.start_us != spec.begins(now_us):
                self._expect(command, answer, Rejected, "moved")
                return ()
            if rule.key not in books.stands:
                new[rule.budget] = new.get(rule.budget, 0) + 1
                if books.counts.get(rule.budget, 0) + new[rule.budget] > command.max_accounts:
                    self._expect(command, answer, Rejected, "accounts")
                    return ()
        self._admit(command, answer, now_us)
        return [rule.key for rule, _ in command.lines]

    def _admit(self, command: Reserve, answer: Answer, now_us: int) -> None:
        """Whether it had to be granted: there is room everywhere, no mark stops it, nobody came before."""
        books = self.books
        lines: list[tuple[Stand, int]] = []
        for rule, amount in command.lines:
            stand = books.stands.get(rule.key)
            if stand is None:
                stand = Stand(rule.key, books.specs[rule.budget], now_us)
            lines.append((stand, amount))
        stops, steps, short = False, False, []
        for stand, amount in lines:
            now = stand if stand.spec is books.specs[stand.spec.name] else self._under(stand)
            now.look(now_us)
            acting = now.acting() if now.spec.enforce else []
            stops = stops or any(now.spec.marks[index][1] in STOPPING for index in acting)
            steps = steps or bool(acting and acting[-1] >= command.complied.get(stand.key, 0))
            if now.spec.enforce and (now.available() < amount or stand.key == command.behind):
                short.append(stand.key)
        if stops or (short and not steps):
            self._expect(command, answer, Refused)
            self._refused(command, answer, lines, stops, short, now_us)
        elif steps:
            self._expect(command, answer, Stepped)
        else:
            if type(answer) is not Granted:
                raise Broken(f"I1: {command} fits, and was answered by {answer}")
            self._hold(command, answer, lines, now_us)

    def _under(self, stand: Stand) -> Stand:
        now = pickle.loads(pickle.dumps(stand))
        now.take(self.books.specs[stand.spec.name])
        return now  # type: ignore[no-any-return]

    def _hold(self, command: Reserve, answer: Granted, lines: list[tuple[Stand, int]], now_us: int) -> None:
        books, given = self.books, answer.reservation
        told = {key: amount for key, _, amount in given.held}
        if (told, given.reserved_us, given.expires_us) != (
            {stand.key: amount for stand, amount in lines},
            now_us,
            now_us + command.ttl_us,
        ):
            raise Broken(f"I2: {command} was granted as {given}")
        for stand, amount in lines:
            self._made(stand)
            stand.take(books.specs[stand.spec.name])
            stand.look(now_us)
            stand.hold(amount)
        books.calls[command.id] = call = Held(command, now_us, "open")
        if "-" in command.id:  # as leases are named, and no call is
            books.granted[command.id] = dict(call.amounts)
        self.granted.add(command.id)

    def _refused(
        self,
        command: Reserve,
        answer: Refused,
        lines: list[tuple[Stand, int]],
        stops: bool,
        short: list[str],
        now_us: int,
    ) -> None:
        key = answer.account.rule.key
        if (answer.mark is not None) != stops or (not stops and key != short[0]):
            raise Broken(f"I1: {command} must be refused by {short[:1]} (mark: {stops}), it was by {key} {answer.mark}")
        if command.quiet:
            return
        stand = next(one for one, _ in lines if one.key == key)
        budget = stand.spec.name
        own = [one for one, _ in lines if one.spec.name == budget]
        all_of_it = any(one.key not in self.books.stands for one in own)
        for one in own:  # of the accounts that it would have made, those of the refusing budget stand
            if all_of_it or one is stand:
                one.take(self.books.specs[budget])
                one.look(now_us)
                self._made(one)
        minute = now_us // 60_000_000
        stand.refused[minute] = stand.refused.get(minute, 0) + 1

    def _tell(self, command: Tell, answer: Answer, now_us: int) -> Iterable[str]:
        self._expect(command, answer, Told)
        if not answer.again:  # type: ignore[union-attr]
            self.books.alerts.append(command.id)
        return ()
