"""How reservations end: settled, released, expired, and corrected after that; or live on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.accounts import Account, book
from bursar.commands import Alert, Decision, Ended, Entry, Expire, Extend, Extended, Release, Reservation, Row, Settle
from bursar.law.standing import NOTHING, OPERATOR_KEY, Read, crossed, reject
from bursar.signing import verifies

_new = tuple.__new__  # half the time of a NamedTuple's own, on the paths that every call takes


def settle(read: Read, command: Settle, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Reservation:
        actual = command.actuals.get
        amounts = {key: 0 if unit == "slots" else actual(unit, held) for key, unit, held in row.held}
        return _end(read, row, "settlement", amounts, command, now_us)
    if type(row) is not Entry:
        return reject("unknown", command.id)
    if row.kind == "expiry":
        return _settle_late(read, row, command, now_us)
    if row.kind != "settlement":
        return reject("ended", row.kind)
    return _settled_again(read, row, command)


def _settled_again(read: Read, entry: Entry, command: Settle) -> Decision:
    if (entry.cost_nanos, entry.usage, entry.outcome) != (command.cost_nanos, command.usage, command.outcome):
        return reject("conflict", command.id)
    accounts = tuple(account for key in entry.amounts if type(account := read(key)) is Account)
    return Decision(Ended(entry, accounts, again=True), NOTHING)


def _end(
    read: Read, row: Reservation, kind: str, amounts: dict[str, int], told: Settle | Release, now_us: int
) -> Decision:
    """Replace an open reservation by its entry, and move every account of it."""
    puts: dict[str, Row] = {}
    accounts = []
    reserved_us = row.reserved_us
    for key, _, held in row.held:
        account = read(key)
        assert type(account) is Account, f"I2 broken: {key} is missing"
        assert account.reserved >= held, f"I2 broken: {key} holds less than its reservations"
        actual = amounts[key]
        after = book(account, held, actual, reserved_us, now_us, actual - held if actual > held else 0)
        if after.rule.marks:
            after = crossed(account, after, row.id, row.draft, now_us, puts)
        puts[key] = after
        accounts.append(after)
    cost_nanos, usage, estimated = (
        (told.cost_nanos, told.usage, told.estimated) if type(told) is Settle else (0, {}, False)
    )
    fields = (
        row.id,
        kind,
        None,
        told.outcome,
        estimated,
        told.reason,
        cost_nanos,
        usage,
        amounts,
        reserved_us,
        now_us,
        row.digest,
        row.draft,
        told.facts,
    )
    alerts = tuple(put for put in puts.values() if type(put) is Alert) if len(puts) > len(accounts) else ()
    puts[row.id] = entry = _new(Entry, fields)
    return _new(Decision, (_new(Ended, (entry, tuple(accounts), False, alerts)), puts))


def _settle_late(read: Read, expired: Entry, command: Settle, now_us: int) -> Decision:
    """A settlement after expiry: the true figures less what the expiry booked, as a further entry."""
    key = expired.id + "~"
    usage = difference(command.usage, expired.usage)
    cost_nanos = command.cost_nanos - expired.cost_nanos
    done = read(key)
    if type(done) is Entry:
        if done.kind == "correction" and (done.cost_nanos, done.usage) == (cost_nanos, usage):
            return Decision(Ended(done, (), again=True), NOTHING)
        return reject("ended", done.kind)
    units = expired.facts["units"]
    held = expired.facts["held"]
    amounts = {
        account: 0 if units[account] == "slots" else command.actuals.get(units[account], held[account]) - booked
        for account, booked in expired.amounts.items()
    }
    return _correct(read, expired, key, amounts, command, cost_nanos, usage, now_us)


def _correct(
    read: Read,
    expired: Entry,
    key: str,
    amounts: dict[str, int],
    told: Settle | Release,
    cost_nanos: int,
    usage: dict[str, Any],
    now_us: int,
) -> Decision:
    puts: dict[str, Row] = {}
    for account_key, amount in amounts.items():
        account = read(account_key)
        assert type(account) is Account, f"I2 broken at {account_key}"
        after = book(account, 0, amount, expired.reserved_us, now_us, max(0, amount))
        puts[account_key] = crossed(account, after, key, expired.draft, now_us, puts)
    alerts = tuple(put for put in puts.values() if type(put) is Alert)
    puts[key] = entry = Entry(
        key,
        "correction" if type(told) is Settle else "reversal",
        expired.id,
        told.outcome,
        type(told) is Settle and told.estimated,
        told.reason,
        cost_nanos,
        usage,
        amounts,
        expired.reserved_us,
        now_us,
        expired.digest,
        expired.draft,
        told.facts,
    )
    accounts = tuple(put for put in puts.values() if type(put) is Account)
    return Decision(Ended(entry, accounts, alerts=alerts), puts)


def difference(actual: Mapping[str, Any], booked: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be added to the counts that were booked to reach the actual ones; facts are the actual ones."""
    result: dict[str, Any] = {}
    for name in [*actual, *(name for name in booked if name not in actual)]:
        new, old = actual.get(name), booked.get(name)
        if isinstance(new, bool) or isinstance(new or old, (str, list)):
            result[name] = new
        elif isinstance(new or old, Mapping):
            inner = difference(new or {}, old or {})
            result |= {name: inner} if inner else {}
        elif (new or 0) - (old or 0):
            result[name] = (new or 0) - (old or 0)
    return result


def release(read: Read, command: Release, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Reservation:
        amounts = {key: command.actuals.get(unit, 0) for key, unit, _ in row.held}
        return _end(read, row, "release", amounts, command, now_us)
    if type(row) is not Entry:
        return reject("unknown", command.id)
    if row.kind == "release":
        return Decision(Ended(row, (), again=True), NOTHING)
    if row.kind != "expiry":
        return reject("ended", row.kind)
    done = read(row.id + "~")
    if type(done) is Entry:
        if done.kind == "reversal":
            return Decision(Ended(done, (), again=True), NOTHING)
        return reject("ended", done.kind)
    operator = read(OPERATOR_KEY)
    if type(operator) is str and not verifies(operator, "release", command.id, {"signature": command.proof}):
        return reject("operator", command.id)
    amounts = {key: -amount for key, amount in row.amounts.items()}
    usage = difference({}, row.usage)
    return _correct(read, row, row.id + "~", amounts, command, -row.cost_nanos, usage, now_us)


def extend(read: Read, command: Extend, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is not Reservation:
        return reject("ended", row.kind) if type(row) is Entry else reject("unknown", command.id)
    expires_us = max(row.expires_us, now_us + command.ttl_us)
    return Decision(Extended(expires_us), {row.id: row._replace(expires_us=expires_us)})


def expire(read: Read, command: Expire, now_us: int) -> Decision:
    """The outcome is unknown: `charge` books the reserved amounts as estimated; slots are free at once (I5)."""
    row = read(command.id)
    if type(row) is not Reservation:
        return reject("ended", row.kind) if type(row) is Entry else reject("unknown", command.id)
    if now_us < row.expires_us:
        return reject("live", command.id)
    charge = row.on_expiry == "charge"
    amounts = {key: held if charge and unit != "slots" else 0 for key, unit, held in row.held}
    told = Settle(
        row.id,
        {},
        row.draft.get("cost_nanos", 0) if charge else 0,
        row.draft.get("usage", {}) if charge else {},
        "cancelled",
        True,
        "expired: the outcome is unknown",
        {
            "units": {key: unit for key, unit, _ in row.held},
            "held": {key: held for key, _, held in row.held},
        },
    )
    return _end(read, row, "expiry", amounts, told, now_us)
