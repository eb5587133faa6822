"""Commands on their way to the server's script and answers on their way back, as JSON; rows as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from bursar.accounts import Account, Mark, Rule
from bursar.commands import (
    Alert,
    Answer,
    Charge,
    Command,
    Draw,
    Drawn,
    Ended,
    Entry,
    Expire,
    Extend,
    Extended,
    Granted,
    Refused,
    Rejected,
    Release,
    Reservation,
    Reserve,
    Row,
    Settle,
    Stepped,
    Tell,
    Told,
)
from bursar.errors import InvalidInput
from bursar.law import OPERATOR_KEY
from bursar.stores.sqlite_rows import dumps

MAX_KNOWN = 4_096  # rules whose text is remembered
MAX_OPEN = 4_096  # reservations that are remembered
NUMBER = 18  # digits of a rule's number, by which it is told from others of its account

Fields = Mapping[str, str]


class Wire:
    """Writes commands and reads answers. Figures travel as texts, since the server's numbers are not exact.

    It remembers what its own process has open, so that the server need not tell it again of what is settled.
    """

    def __init__(self) -> None:
        self._texts: dict[Rule, tuple[str, str, str]] = {}
        self._rules: dict[str, tuple[list[Any], Rule]] = {}
        self._open: dict[str, tuple[Reserve, int]] = {}  # when it was reserved; nothing of it was shadowed

    def texts(self, command: Command, entry: Entry | None = None, operator: str | None = None) -> list[str]:
        """The command, its parts as texts. `entry`: what the law has made of a row that the server told, see `rows`."""
        if type(command) is Reserve:
            fields = [
                "reserve", command.id, dumps(command.digest), str(command.ttl_us), command.on_expiry, str(command.version),
                str(command.max_accounts), "1" if command.quiet else "", command.behind, dumps(command.draft),
                dumps(command.complied) if command.complied else "{}",
            ]  # fmt: skip
            return self._with_lines(fields, command.lines)
        if type(command) is Charge:
            fields = [
                "charge", command.id, dumps(command.digest), _head("charge", None, command), dumps(command.facts),
                str(command.version), str(command.max_accounts), dumps(command.draft),
            ]  # fmt: skip
            return self._with_lines(fields, command.lines)
        if type(command) is Draw:
            sums = [sum(one.amounts.get(rule.key, 0) for one in command.entries) for rule in command.rules]
            overruns = dumps({key: str(amount) for key, amount in command.overruns.items()})
            entries = dumps([_written(one) for one in command.entries])
            fields = ["draw", command.id, str(command.version), str(command.max_accounts), overruns, entries]
            return self._with_lines(fields, tuple(zip(command.rules, sums, strict=True)))
        if entry is not None:
            amounts = dumps([str(amount) for amount in entry.amounts.values()])
            head, facts = _head(entry.kind, entry.corrects, entry), dumps(entry.facts)
            return [_NAMES[type(command)], command.id, head, facts, amounts, operator or "", "{}"]
        if type(command) is Settle or type(command) is Release:
            actuals = dumps({unit: str(amount) for unit, amount in command.actuals.items()})
            head = _head("settlement" if type(command) is Settle else "release", None, command)
            fields = [_NAMES[type(command)], command.id, head, dumps(command.facts), "", "", actuals]
            known = self._open.get(command.id) if type(command) is Settle else None
            return fields if known is None else [*fields, *[self._line(rule)[2] for rule, _ in known[0].lines]]
        if type(command) is Extend:
            return ["extend", command.id, str(command.ttl_us)]
        if type(command) is Expire:
            return ["expire", command.id, "", "", ""]
        assert type(command) is Tell
        return ["tell", command.id, command.kind, dumps(command.facts)]

    def _with_lines(self, fields: list[str], lines: tuple[tuple[Rule, int], ...]) -> list[str]:
        known = [(self._line(rule), amount) for rule, amount in lines]
        held = "".join([f"{line}{amount}\n" for (line, _, _), amount in known])
        return [*fields, held, *[rule for (_, rule, _), _ in known]]

    def _line(self, rule: Rule) -> tuple[str, str, str]:
        """The text of a line before its amount, that of its rule, and of that what the server needs to book under it."""
        texts = self._texts.get(rule)
        if texts is None:
            if "\n" in rule.key or "\n" in rule.unit:
                raise InvalidInput(
                    f"The account {rule.key!r} has a line break in its key. Use JSON text.", key=rule.key
                )
            if len(self._texts) >= MAX_KNOWN:
                self._texts.clear()
            marks = [(str(mark.at), mark.action) for mark in rule.marks]
            figures = rule.kind, rule.limit, rule.period_us, len(marks), int(rule.enforce), rule.start_us, rule.end_us
            told = dumps((*figures, rule.key, rule.budget, rule.scope, rule.unit, marks))
            digest = hashlib.blake2b(told.encode(), digest_size=8).digest()
            number = 10**17 + int.from_bytes(digest, "big") % (9 * 10**17)
            texts = self._texts[rule] = f"{rule.key}\n{rule.unit}\n", f"{number}{told}", _booking(number, rule)
        return texts

    # -- answers

    def answer(self, command: Command, told: Sequence[Any]) -> Answer:
        """The answer in the server's JSON; that it found a row is for the law to answer."""
        kind = told[0]
        if kind == "granted":
            assert type(command) is Reserve
            return self._granted(command, told)
        if kind == "booked":
            assert type(command) is Settle
            return self._booked(command, told)
        if kind == "ended":
            self._open.pop(command.id, None)
            return self._ended(command, told)
        if kind == "refused":
            assert type(command) is Reserve
            _, _, short, retry, free, mark, found = told
            accounts = [_account(rule, row) for (rule, _), row in zip(command.lines, found, strict=True)]
            lines = tuple(zip(accounts, (amount for _, amount in command.lines), strict=True))
            account, asked = lines[short]
            return Refused(account, asked, retry, free, lines, mark)
        if kind == "drawn":
            assert type(command) is Draw
            accounts = [self.account(row) for row in told[2]]
            return Drawn(len(command.entries), told[1], tuple(accounts), tuple([Alert._make(one) for one in told[3]]))
        if kind == "extended":
            return Extended(told[1])
        if kind == "stepped":
            return Stepped(told[1])
        if kind == "told":
            return Told(told[1])
        return Rejected(told[1], told[2])

    def _granted(self, command: Reserve, told: Sequence[Any]) -> Granted:
        _, now_us, found, names = told
        shadowed = tuple(names)
        draft = {**command.draft, "shadowed": names} if shadowed else command.draft
        if not shadowed:
            while len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[command.id] = command, now_us
        accounts = tuple([_account(rule, row) for (rule, _), row in zip(command.lines, found, strict=True)])
        held = tuple([(rule.key, rule.unit, amount) for rule, amount in command.lines])
        fields = (command.id, held, now_us, now_us + command.ttl_us, command.on_expiry, command.digest, draft)
        return Granted(Reservation._make(fields), accounts, shadowed)

    def _booked(self, command: Settle, told: Sequence[Any]) -> Ended:
        """A settlement of what is remembered; the server has told what it could not know."""
        reserve, reserved_us = self._open.pop(command.id)
        _, amounts, now_us, found = told
        booked = {rule.key: amount for (rule, _), amount in zip(reserve.lines, amounts, strict=True)}
        head = (command.id, "settlement", None, command.outcome, command.estimated, command.reason, command.cost_nanos)
        rest = (command.usage, booked, reserved_us, now_us, reserve.digest, reserve.draft, command.facts)
        accounts = tuple([_account(rule, row) for (rule, _), row in zip(reserve.lines, found, strict=True)])
        return Ended(Entry._make((*head, *rest)), accounts)

    def _ended(self, command: Command, told: Sequence[Any]) -> Ended:
        _, reserved_us, digest, draft, found, alerts, entry = told
        accounts = tuple([self.account(row) for row in found])
        id = command.id if entry[1] is None else f"{command.id}~"
        keys = [account.rule.key for account in accounts]
        made = tuple([Alert._make(alert) for alert in alerts])
        return Ended(_entry(id, keys, reserved_us, digest, draft, entry), accounts, alerts=made)

    def rows(self, command: Command, told: Sequence[Any]) -> tuple[int, dict[str, Row]]:
        """The server's time, and the rows that it found under the command's id, for the law to say what they mean to it."""
        _, now_us, (row, correction, operator), accounts = told
        found: dict[str, Row] = {account.rule.key: account for account in map(self.account, accounts)}
        found[command.id] = row_of(command.id, _pairs(row))
        if correction is not None:
            found[f"{command.id}~"] = row_of(f"{command.id}~", _pairs(correction))
        if operator is not None:
            found[OPERATOR_KEY] = operator
        return now_us, found

    @staticmethod
    def undrawn(command: Draw, told: Sequence[Any]) -> Draw | Rejected:
        """What is left to draw, where the server has found some of the entries on the books; a conflict where they differ."""
        known = {id: row_of(id, _pairs(row)) for id, row in told[1]}
        conflict = next((one.id for one in command.entries if known.get(one.id, one) != one), None)
        if conflict is not None:
            return Rejected("conflict", conflict)
        return command._replace(entries=tuple(one for one in command.entries if one.id not in known))

    def account(self, row: Sequence[Any]) -> Account:
        """The account in an answer, its rule in front."""
        told = row[0]
        known = self._rules.get(told[7])
        if known is None or known[0] != told:
            if len(self._rules) >= MAX_KNOWN:
                self._rules.clear()
            known = self._rules[told[7]] = told, _rule(told)
        return _account(known[1], row)

    def stored_account(self, rule: bytes, figures: bytes) -> Account:
        """The account whose texts those are."""
        row = from_json(b"[%b]" % figures)
        row[0] = from_json(rule[NUMBER:])
        return self.account(row)


_NAMES: dict[type, str] = {Settle: "settle", Release: "release", Expire: "expire"}


def _head(kind: str, corrects: str | None, told: Entry | Charge | Settle | Release) -> str:
    """What an entry tells before its amounts, as JSON without brackets."""
    booked: tuple[bool, int, Mapping[str, Any]] = (False, 0, {})
    if not isinstance(told, Release):
        booked = told.estimated, told.cost_nanos, told.usage
    estimated, cost_nanos, usage = booked
    return dumps((kind, corrects, told.outcome, estimated, told.reason, cost_nanos, usage))[1:-1]


def _booking(number: int, rule: Rule) -> str:
    """What a settlement needs of a rule; empty of one under which only the law settles."""
    if rule.marks or rule.kind == "rolling":
        return ""
    return f"{number}" if rule.kind == "window" else f"{number}{rule.kind},{rule.limit},{rule.period_us}"


def _written(entry: Entry) -> tuple[str, ...]:
    """An entry as its row is to hold it. The units of its amounts are told nowhere, and nobody needs them any more."""
    head = _head(entry.kind, entry.corrects, entry)
    text = f"[{head},{dumps(list(entry.amounts.values()))},{entry.settled_us},{dumps(entry.facts)}]"
    held = "".join(f"{key}\n\n0\n" for key in entry.amounts)
    return entry.id, text, str(entry.reserved_us), dumps(entry.digest), dumps(entry.draft), held


def _account(rule: Rule, row: Sequence[Any]) -> Account:
    _, spent, reserved, level, remainder, at_us, crossed, overrun, refused, minute, in_minute, buckets = row
    sums = tuple([(index, amount) for index, amount in buckets]) if buckets else ()
    fields = (rule, spent, reserved, overrun, refused, minute, in_minute, level, remainder, at_us, sums, crossed)
    return Account._make(fields)


def _rule(told: Sequence[Any]) -> Rule:
    kind, limit, period_us, _, enforce, start_us, end_us, key, budget, scope, unit, marks = told
    made = tuple(Mark(int(at), action) for at, action in marks)
    return Rule(key, budget, scope, unit, kind, limit, start_us, end_us, period_us, bool(enforce), made)


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def fields_of(row: Mapping[bytes, bytes]) -> dict[str, str]:
    """A hash as texts."""
    return {name.decode(): value.decode() for name, value in row.items()}


def row_of(id: str, fields: Fields) -> Reservation | Entry:
    """The row under an id: an open reservation, or the entry that ended it."""
    lines = fields["held"].split("\n")
    keys, units, amounts = lines[:-1:3], lines[1::3], lines[2::3]
    reserved_us, digest, draft = from_json(f"[{fields['begun']}]")
    if "entry" not in fields:
        held = tuple((key, unit, int(amount)) for key, unit, amount in zip(keys, units, amounts, strict=True))
        expires_us, _, on_expiry = fields["until"].partition(",")
        return Reservation(id, held, reserved_us, int(expires_us), on_expiry, digest, draft)
    return _entry(id, keys, reserved_us, digest, draft, from_json(fields["entry"]))


def _entry(id: str, keys: Sequence[str], reserved_us: int, digest: str, draft: Any, told: Sequence[Any]) -> Entry:
    *head, amounts, settled_us, facts = told
    booked = dict(zip(keys, amounts, strict=False))  # a refusal books nothing
    return Entry._make((id, *head, booked, reserved_us, settled_us, digest, draft, facts))


def alert_of(id: str, fields: Fields) -> Alert:
    """The alert in a hash."""
    return Alert(id, fields["kind"], int(fields["at_us"]), from_json(fields["facts"]))
