"""Costs that have been incurred, and are booked whatever the limits say; and alerts, which come from outside."""

from __future__ import annotations

from bursar.accounts import Account, Rule, age, book
from bursar.commands import Alert, Charge, Decision, Draw, Drawn, Ended, Entry, Reservation, Row, Tell, Told
from bursar.law.standing import NOTHING, POLICY_KEY, Read, accounts_of, crossed, reject, standing


def charge(read: Read, command: Charge, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Entry and row.kind == "charge" and row.digest == command.digest:
        return Decision(Ended(row, (), again=True), NOTHING)
    if row is not None:
        return reject("conflict", command.id)
    puts: dict[str, Row] = {}
    accounts = []
    for rule, amount in command.lines:
        account = _incurring(read, rule, command, now_us, puts)
        if type(account) is not Account:
            return reject(*account)
        uncovered = max(0, amount - max(0, age(account, now_us).available))
        after = book(account, 0, amount, now_us, now_us, uncovered)
        after = puts[rule.key] = crossed(account, after, command.id, command.draft, now_us, puts)
        accounts.append(after)
    alerts = tuple(put for put in puts.values() if type(put) is Alert)
    puts[command.id] = entry = Entry(
        command.id,
        "charge",
        None,
        command.outcome,
        command.estimated,
        command.reason,
        command.cost_nanos,
        command.usage,
        {rule.key: amount for rule, amount in command.lines},
        now_us,
        now_us,
        command.digest,
        command.draft,
        command.facts,
    )
    return Decision(Ended(entry, tuple(accounts), alerts=alerts), puts)


def _incurring(
    read: Read, rule: Rule, command: Charge | Draw, now_us: int, puts: dict[str, Row]
) -> Account | tuple[str, str]:
    """As `standing`, of an account on which a cost has been incurred already."""
    if command.version < (read(POLICY_KEY) or 0) and type(known := read(rule.key)) is Account:  # type: ignore[operator]
        rule = known.rule  # a cost is booked by whatever policy, but an older one changes no limit
    # what was incurred in a window belongs to it, however late it is told, or however far the store's clock is behind
    in_window_us = now_us if rule.end_us is None else max(rule.start_us, min(now_us, rule.end_us - 1))
    return standing(read, rule, in_window_us, puts, command.max_accounts)


def draw(read: Read, command: Draw, now_us: int) -> Decision:
    lease = read(command.id)
    new: list[Entry] = []
    for entry in command.entries:
        known = read(entry.id)
        if known is None:
            new.append(entry)
        elif known != entry:
            return reject("conflict", entry.id)
    left = {key: held for key, _, held in lease.held} if type(lease) is Reservation else None
    if not new:
        held = tuple((rule.key, rule.unit, 0) for rule in command.rules)
        return Decision(Drawn(0, left, accounts_of(read, held)), NOTHING)
    puts: dict[str, Row] = {entry.id: entry for entry in new}
    accounts = []
    for rule in command.rules:
        assert rule.kind == "window", f"{rule.key} is no account of a lease"
        account = _incurring(read, rule, command, now_us, puts)
        if type(account) is not Account:
            return reject(*account)
        actual = sum(entry.amounts.get(rule.key, 0) for entry in new)
        paid = min(left[rule.key], actual) if left is not None and rule.key in left else 0
        uncovered = actual - paid - max(0, account.available)
        after = book(account, paid, actual, now_us, now_us, max(0, uncovered, command.overruns.get(rule.key, 0)))
        after = puts[rule.key] = crossed(account, after, new[-1].id, new[-1].draft, now_us, puts)
        accounts.append(after)
        if paid and left is not None:
            left[rule.key] -= paid
    if type(lease) is Reservation and left is not None:
        still = tuple((key, unit, left[key]) for key, unit, _ in lease.held)
        draft = {**lease.draft, "cost_nanos": max((held for _, unit, held in still if unit == "USD"), default=0)}
        puts[lease.id] = lease._replace(held=still, draft=draft)
    alerts = tuple(put for put in puts.values() if type(put) is Alert)
    return Decision(Drawn(len(new), left, tuple(accounts), alerts), puts)


def tell(read: Read, command: Tell, now_us: int) -> Decision:
    key = "^" + command.id
    if read(key) is not None:
        return Decision(Told(True), NOTHING)
    return Decision(Told(False), {key: Alert(command.id, command.kind, now_us, command.facts)})
