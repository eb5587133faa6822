"""Commands on their way to the server's functions and answers on their way back, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from pydantic_core import from_json

from bursar.accounts import Account, Rule
from bursar.commands import (
    Alert,
    Answer,
    Charge,
    Command,
    Draw,
    Drawn,
    Ended,
    Expire,
    Extend,
    Extended,
    Granted,
    Refused,
    Rejected,
    Release,
    Reservation,
    Reserve,
    Settle,
    Stepped,
    Tell,
    Told,
)
from bursar.law import difference
from bursar.signing import verifies
from bursar.stores import sqlite_rows as rows
from bursar.stores.entry_text import entry_text
from bursar.stores.postgres.fast import MAX_KNOWN, Values

_ACCOUNT = itemgetter(
    "key", "budget", "scope", "unit", "kind", "limit", "start_us", "end_us", "period_us", "enforce", "spent", "reserved",
    "overrun", "refused", "refused_minute", "refused_in_minute", "level", "remainder", "at_us", "buckets", "crossed", "marks",
)  # fmt: skip
_ENTRY = itemgetter(
    "id", "kind", "corrects", "outcome", "estimated", "reason", "cost_nanos", "usage", "amounts", "reserved_us", "settled_us",
    "digest", "draft", "facts",
)  # fmt: skip
_RESERVATION = itemgetter("id", "held", "reserved_us", "expires_us", "on_expiry", "digest", "draft")


class Wire:
    """Writes commands. A line travels as the row that its account would be if it were new, its amount as `reserved`."""

    def __init__(self) -> None:
        self._lines: dict[Rule, str] = {}

    def knows(self, command: Command) -> bool:
        """Whether every account of the command has been met before, so that the server need not make one."""
        if type(command) is not Reserve and type(command) is not Charge:
            return True
        return all(rule in self._lines for rule, _ in command.lines)

    def text(self, command: Command, *, late: Mapping[str, Any] | None = None, fast: Values | None = None) -> str:
        """The command as JSON; `late`: what the server asked for, see `late`; `fast`: the values of its fast way."""
        fields = _FIELDS[type(command)](command)
        if late is not None:
            fields["late"] = late
        if fast is not None:
            fields["fast"] = fast
        if type(command) is Reserve or type(command) is Charge:
            fields["lines"] = f"[{','.join([f'{self._line(rule)}{amount}}}' for rule, amount in command.lines])}]"
        return rows.dumps(fields)

    def draw(self, command: Draw) -> str:
        """As `text`, of a draw whose entries are all new: their sums. Its entries travel beside it, see `copied`."""
        last = command.entries[-1] if command.entries else None
        sums = {rule: sum(entry.amounts.get(rule.key, 0) for entry in command.entries) for rule in command.rules}
        fields = {
            "id": command.id,
            "last": last.id if last else "",
            "draft": rows.dumps(last.draft) if last else "",
            "overruns": command.overruns,
            "version": command.version,
            "max": command.max_accounts,
            "lines": f"[{','.join([f'{self._line(rule)}{amount}}}' for rule, amount in sums.items()])}]",
        }
        return rows.dumps(fields)

    def _line(self, rule: Rule) -> str:
        """The text before a line's amount."""
        text = self._lines.get(rule)
        if text is None:
            if len(self._lines) >= MAX_KNOWN:
                self._lines.clear()
            new = dict(zip(Rule._fields, rule, strict=True)) | {
                "marks": rows.dumps(rule.marks) if rule.marks else "",
                "spent": 0, "overrun": 0, "refused": 0, "refused_minute": 0, "refused_in_minute": 0,
                "level": 0, "remainder": 0, "at_us": 0, "buckets": "", "crossed": 0,
            }  # fmt: skip
            text = self._lines[rule] = f'{rows.dumps(new)[:-1]},"reserved":'
        return text


def _reserve(command: Reserve) -> dict[str, Any]:
    return {
        "c": "reserve",
        "id": command.id,
        "held": rows.dumps([(rule.key, rule.unit, amount) for rule, amount in command.lines]),
        "ttl_us": command.ttl_us,
        "draft": rows.dumps(command.draft),
        "digest": command.digest,
        "on_expiry": command.on_expiry,
        "version": command.version,
        "max": command.max_accounts,
        "quiet": command.quiet,
        "complied": command.complied,
        "behind": command.behind,
    }


def _settle(command: Settle) -> dict[str, Any]:
    fields = command._asdict()
    return {
        "c": "settle",
        **fields,
        "usage": rows.dumps(command.usage),
        "facts": rows.dumps(command.facts),
        "answered": command.facts.get("model_answered"),
    }


def _release(command: Release) -> dict[str, Any]:
    fields = command._asdict()
    del fields["proof"]
    return {"c": "release", **fields, "facts": rows.dumps(command.facts)}


def _charge(command: Charge) -> dict[str, Any]:
    return {
        "c": "charge",
        "id": command.id,
        "cost_nanos": command.cost_nanos,
        "usage": rows.dumps(command.usage),
        "draft": rows.dumps(command.draft),
        "digest": command.digest,
        "estimated": command.estimated,
        "reason": command.reason,
        "outcome": command.outcome,
        "version": command.version,
        "max": command.max_accounts,
        "facts": rows.dumps(command.facts),
    }


_FIELDS: dict[type, Any] = {
    Reserve: _reserve,
    Settle: _settle,
    Release: _release,
    Charge: _charge,
    Extend: lambda command: {"c": "extend", "id": command.id, "ttl_us": command.ttl_us},
    Expire: lambda command: {"c": "expire", "id": command.id},
    Tell: lambda command: {
        "c": "tell",
        "id": command.id,
        "kind": command.kind,
        "facts": rows.dumps(command.facts),
    },
}


def late(command: Settle | Release, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the server cannot work out about an expiry: the differences of usage and cost, and the operator who has signed.

    The expiry is on the books and does not change any more, so this may be worked out here.
    """
    expired = rows.entry(_ENTRY(answer["entry"]))
    cost_nanos, usage = (command.cost_nanos, command.usage) if type(command) is Settle else (0, {})
    found = {"cost_nanos": cost_nanos - expired.cost_nanos, "usage": rows.dumps(difference(usage, expired.usage))}
    public = answer["operator"]
    if type(command) is Release and public is not None:
        proven = verifies(public, "release", command.id, {"signature": command.proof})
        found["operator"] = public if proven else None
    return found


def copied(command: Draw) -> str:
    """The entries of a draw as COPY takes them, for the columns of `entry_text`."""
    texts = command.texts
    return "".join([f"{texts.get(entry.id) or entry_text(entry)}\n" for entry in command.entries])


def answer_of(command: Command, told: Mapping[str, Any]) -> Answer:
    """The answer in the server's JSON."""
    answer: Answer = _ANSWERS[told["t"]](command, told)
    return answer


def _accounts(told: Mapping[str, Any]) -> tuple[Account, ...]:
    return tuple([rows.account(_ACCOUNT(row)) for row in told["accounts"] or ()])


def _alerts(told: Mapping[str, Any]) -> tuple[Alert, ...]:
    return tuple([Alert(row["id"], row["kind"], row["at_us"], from_json(row["facts"])) for row in told["alerts"]])


def _granted(command: Reserve, told: Mapping[str, Any]) -> Granted:
    shadowed = tuple(told["shadowed"])
    draft = {**command.draft, "shadowed": list(shadowed)} if shadowed else command.draft
    held = tuple([(rule.key, rule.unit, amount) for rule, amount in command.lines])
    now_us = told["now_us"]
    reservation = Reservation(
        command.id, held, now_us, now_us + command.ttl_us, command.on_expiry, command.digest, draft
    )
    return Granted(reservation, _accounts(told), shadowed)


def _granted_again(command: Reserve, told: Mapping[str, Any]) -> Granted:
    if "entry" in told:
        ended = rows.entry(_ENTRY(told["entry"]))
        held = tuple((key, "", amount) for key, amount in ended.amounts.items())
        fields = (ended.id, held, ended.reserved_us, ended.settled_us, "charge", ended.digest, ended.draft)
        return Granted(Reservation(*fields), _accounts(told))
    return Granted(rows.reservation(_RESERVATION(told["reservation"])), _accounts(told))


def _refused(command: Reserve, told: Mapping[str, Any]) -> Refused:
    accounts = _accounts(told)
    short = told["line"]
    lines = tuple(zip(accounts, (amount for _, amount in command.lines), strict=True))
    return Refused(accounts[short], lines[short][1], told["retry"], told["free"], lines, told["mark"])


def _ended(_command: Command, told: Mapping[str, Any]) -> Ended:
    return Ended(rows.entry(_ENTRY(told["entry"])), _accounts(told), told["again"], _alerts(told))


_ANSWERS: dict[str, Any] = {
    "granted": _granted,
    "granted again": _granted_again,
    "refused": _refused,
    "ended": _ended,
    "drawn": lambda command, told: Drawn(len(command.entries), told["left"], _accounts(told), _alerts(told)),
    "stepped": lambda _, told: Stepped(told["marks"]),
    "extended": lambda _, told: Extended(told["expires_us"]),
    "told": lambda _, told: Told(told["again"]),
    "rejected": lambda _, told: Rejected(told["why"], told["detail"]),
}
