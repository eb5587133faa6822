"""The books of the auditor: all that has happened, and what an answer of the store is held against."""

from __future__ import annotations

from typing import Any

from bursar.commands import Answer, Charge, Command, Ended, Entry, Reserve
from sim.stands import Spec, Stand


class Broken(AssertionError):
    """An invariant does not hold. The text begins with its id."""


class Held:
    """A reservation, from its begin to its end and after. `state`: open, charge, or the kind of its last entry."""

    __slots__ = ("amounts", "at_us", "booked", "charge", "digest", "expires_us", "id", "state", "told", "units")

    def __init__(self, command: Reserve | Charge, now_us: int, state: str) -> None:
        self.id = command.id
        self.amounts = {rule.key: amount for rule, amount in command.lines}
        self.units = {rule.key: rule.unit for rule, _ in command.lines}
        self.digest = command.digest
        self.at_us = now_us
        self.state = state
        self.told: Any = None
        self.booked: dict[str, int] = {}
        if type(command) is Reserve:
            self.expires_us = now_us + command.ttl_us
            self.charge = command.on_expiry == "charge"


def drawn(books: Books, entry: Entry) -> None:
    """Know a call that was made out of a lease by the entry that ended it, or that corrected its end."""
    content = (entry.cost_nanos, dict(entry.usage), entry.outcome)
    if entry.corrects is not None:
        call, first = books.calls[entry.corrects], books.entries[entry.corrects]
        call.state = entry.kind
        call.told = (first.cost_nanos + entry.cost_nanos, _sum(first.usage, entry.usage), entry.outcome)
        return
    call = books.calls[entry.id] = Held.__new__(Held)
    call.id, call.state, call.told, call.digest = entry.id, entry.kind, content, entry.digest
    call.amounts = dict(entry.facts.get("held", entry.amounts))
    call.units = dict(entry.facts.get("units", {}))
    call.booked, call.at_us, call.expires_us, call.charge = dict(entry.amounts), entry.reserved_us, 0, False


def _sum(first: Any, more: Any) -> dict[str, Any]:
    """A usage and what corrects it: counts add up, of a model's name the later one holds."""
    return {
        name: more[name] if isinstance(more.get(name), str) else first.get(name, 0) + more.get(name, 0)
        for name in {**first, **more}
    }


class Books:
    """Everything that has happened, as far as it decides what comes."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self.earlier: dict[
            str, list[tuple[int, Spec]]
        ] = {}  # every definition of a budget, with the version it came in
        self.stands: dict[str, Stand] = {}
        self.calls: dict[str, Held] = {}
        self.entries: dict[str, Entry] = {}
        self.granted: dict[str, dict[str, int]] = {}  # to every lease
        self.drawn: dict[str, dict[str, int]] = {}  # on every lease
        self.counts: dict[str, int] = {}
        self.alerts: list[str] = []
        self.version = 0
        self.now_us = 0

    def spec_at(self, budget: str, version: int) -> Spec:
        """The definition that a process with this version of the policy has."""
        known = self.earlier[budget]
        return next((spec for since, spec in reversed(known) if since <= version), known[0][1])


class Judge:
    """What the judgements of all commands share."""

    def __init__(self) -> None:
        self.books = Books()
        self.granted: set[str] = set()  # whatever was granted at any time, even where the store has lost it since
        self.full: set[str] = set()  # the costs for which a budget had no more accounts

    def _expect(self, command: Command, answer: Answer, kind: type, why: str = "") -> None:
        if type(answer) is not kind or (why and answer.why != why):  # type: ignore[union-attr]
            raise Broken(f"I5, I6: {command} must be answered by {kind.__name__} {why}, it was {answer}")

    def _made(self, stand: Stand) -> None:
        books, budget = self.books, stand.spec.name
        if stand.key not in books.stands:
            books.stands[stand.key] = stand
            books.counts[budget] = books.counts.get(budget, 0) + 1

    def _move(self, key: str, back: int, spent: int, at_us: int, now_us: int, over: int) -> list[tuple[str, int]]:
        stand = self.books.stands[key]
        over = 0 if stand.spec.unit == "slots" else over
        return [(key, mark) for mark in stand.move(back, spent, at_us, now_us, over)]

    def _alerts(self, crossed: list[tuple[str, int]], answer: Answer) -> None:
        told = [(one.facts["account"], one.facts["mark"]) for one in answer.alerts]  # type: ignore[union-attr]
        if told != crossed:
            raise Broken(f"I10: the marks {crossed} were crossed, alerts tell of {told}")
        self.books.alerts += [one.id for one in answer.alerts]  # type: ignore[union-attr]

    def _entry(
        self, id: str, kind: str, answer: Answer, booked: dict[str, int], reserved_us: int, now_us: int
    ) -> Entry:
        if type(answer) is not Ended or answer.again:
            raise Broken(f"I5, I7: {id} must end by a {kind}, it was answered by {answer}")
        entry = answer.entry
        told = (entry.id, entry.kind, dict(entry.amounts), entry.reserved_us, entry.settled_us)
        if told != (id, kind, booked, reserved_us, now_us):
            raise Broken(f"I3, I10: the {kind} of {id} must book {booked} at {reserved_us}, its record tells {told}")
        self.books.entries[id] = entry
        return entry
