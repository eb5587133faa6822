"""The fast ways of fast.sql: a command as the values of one statement, and the answer in the text that comes back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from bursar.accounts import Account, Rule
from bursar.commands import Command, Ended, Entry, Granted, Release, Reservation, Reserve, Settle
from bursar.stores import sqlite_rows as rows
from bursar.stores.postgres.server import LAW

MAX_KNOWN = 4_096  # rules whose texts are remembered
MAX_OPEN = 4_096  # reservations that are remembered
_RECORD, _UNIT = "\x1e", "\x1f"  # separate the parts of an answer, and those of an account in it
Values = tuple[str | int | None, ...]

STATEMENTS: dict[type, str] = {
    one: f"SELECT {LAW}{name}_fast({', '.join(f'${at}' for at in range(1, values + 1))})"
    for one, name, values in ((Reserve, "reserve", 15), (Settle, "settle", 19))
}


class Fast:
    """What one process knows of its own reservations, so that the server need not read them again to settle them."""

    def __init__(self) -> None:
        self._elements: dict[Rule, tuple[str, ...]] = {}
        self._open: dict[str, Reserve] = {}  # granted by the fast way, and not ended

    def values(self, command: Command, *, first_time: bool) -> Values | None:
        """The values of its statement, without those of the time; None for a command that has to be decided by the whole law.

        `first_time`: an id without a digest, which nobody else can use, is not looked for among the records.
        """
        if type(command) is Reserve:
            return self._reserve(command) if first_time and not command.digest and not command.behind else None
        if type(command) is Settle:
            reserve = self._open.pop(command.id, None)
            if reserve is None:
                return None
            # as the newest: no grant in its batch may push it out before its own answer
            self._open[command.id] = reserve
            return self._settle(command, reserve)
        return None

    def answer(self, command: Command, told: str) -> tuple[Granted | Ended, int]:
        """The answer in the text of a statement, and the server's time."""
        now_us, *parts = told.split(_RECORD)
        if type(command) is Reserve:
            while len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open)), None)
            self._open[command.id] = command
            fields = (int(now_us), int(now_us) + command.ttl_us, command.on_expiry, command.digest, command.draft)
            reservation = Reservation(command.id, _held(command), *fields)
            return Granted(reservation, _accounts(command, parts)), int(now_us)
        assert type(command) is Settle
        reserve = self._open.pop(command.id)
        reserved_us, *after = parts
        spent = _amounts(command, reserve)
        ending = (command.outcome, command.estimated, command.reason, command.cost_nanos, command.usage)
        times = (int(reserved_us), int(now_us))
        entry = Entry(
            command.id, "settlement", None, *ending, spent, *times, reserve.digest, reserve.draft, command.facts
        )
        return Ended(entry, _accounts(reserve, after)), int(now_us)

    def forget(self, command: Command) -> None:
        """The law has decided it."""
        if type(command) is Settle or type(command) is Release:
            self._open.pop(command.id, None)

    def _reserve(self, command: Reserve) -> Values:
        lines = [(*self._element(rule), str(amount)) for rule, amount in sorted(command.lines, key=_key)]
        held, draft = rows.dumps(_held(command)), rows.dumps(command.draft)
        return (command.id, held, command.ttl_us, command.on_expiry, draft, command.version, *_arrays(lines, 7))

    def _settle(self, command: Settle, reserve: Reserve) -> Values:
        spent, lines, tags = _amounts(command, reserve), [], reserve.draft.get("tags", {})
        for rule, amount in sorted(reserve.lines, key=_key):
            key, _, limit, _, enforce, marks = self._element(rule)
            lines.append((key, limit, enforce, marks, str(amount), str(spent[rule.key])))
        return (
            command.id,
            rows.dumps(_held(reserve)),
            *_arrays(lines, 6),
            rows.dumps(spent),
            *_arrays([(_text(tags.get(tag)),) for tag in rows.TAGS], 1),
            command.outcome,
            command.estimated,
            command.reason,
            command.cost_nanos,
            rows.dumps(command.usage),
            rows.dumps(command.facts),
            command.facts.get("model_answered"),
        )

    def _element(self, rule: Rule) -> tuple[str, ...]:
        """Of a rule, the elements of the arrays that tell what may have changed."""
        texts = self._elements.get(rule)
        if texts is None:
            if len(self._elements) >= MAX_KNOWN:
                self._elements.clear()
            end_us = "NULL" if rule.end_us is None else str(rule.end_us)
            marks = rows.dumps(rule.marks) if rule.marks else ""
            texts = (_text(rule.key), rule.kind, str(rule.limit), end_us, str(rule.enforce), _text(marks))
            self._elements[rule] = texts
        return texts


def _key(line: tuple[Rule, int]) -> str:
    """Everybody locks accounts in the order of their keys."""
    return line[0].key


def _held(command: Reserve) -> tuple[tuple[str, str, int], ...]:
    return tuple([(rule.key, rule.unit, amount) for rule, amount in command.lines])


def _amounts(command: Settle, reserve: Reserve) -> dict[str, int]:
    """What is booked, by account."""
    actual = command.actuals.get
    return {rule.key: 0 if rule.unit == "slots" else actual(rule.unit, amount) for rule, amount in reserve.lines}


def _arrays(lines: Iterable[tuple[str, ...]], columns: int) -> list[str]:
    return [f"{{{','.join(column)}}}" for column in zip(*lines, strict=True)] or ["{}"] * columns


def _text(value: str | None) -> str:
    """One element of an array. Source: PostgreSQL's manual, "Array Input and Output Syntax"."""
    if value is None:
        return "NULL"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _accounts(command: Reserve, parts: list[str]) -> tuple[Account, ...]:
    """The accounts as they stand, in the order of the command's lines, whose rules are theirs."""
    found: dict[str, list[Any]] = {key: state for key, *state in [part.split(_UNIT) for part in parts]}
    accounts = []
    for rule, _ in command.lines:
        *counts, buckets, crossed = found[rule.key]
        kept = tuple([(index, amount) for index, amount in from_json(buckets)]) if buckets else ()
        accounts.append(Account._make((rule, *map(int, counts), kept, int(crossed))))
    return tuple(accounts)
