"""The law: what every command does to accounts, as one pure function `decide`, without I/O and without a clock.

A store's whole state is rows by key. An account's key is the JSON text that its rule carries. A reservation stands
under its id while it is open; the entry that ends it then takes its place, so that the row under an id says which of
the states of I5 it is in. The key `ID~` holds the one correction of an expired reservation, `#NAME` the number of a
budget's accounts, `^ID` an alert, `@policy` the newest version of the policy, and `@operator` the operator's public key.
`decide` reads rows through a function and returns the rows to put, which the store must put all together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bursar.accounts import (
    STOPPING,
    Account,
    Rule,
    age,
    book,
    hold,
    in_force,
    may_free,
    reached,
    still_crossed,
    under,
    until,
)
from bursar.commands import (
    Alert,
    Charge,
    Command,
    Decision,
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
from bursar.signing import verifies

POLICY_KEY = "@policy"
OPERATOR_KEY = "@operator"
REFUSALS_PER_MINUTE = 60
MINUTE_US = 60_000_000

Read = Callable[[str], Row | None]
_new = tuple.__new__  # half the time of a NamedTuple's own, on the paths that every call takes
_NOTHING: dict[str, Row] = {}


def decide(read: Read, command: Command, now_us: int) -> Decision:
    """What `command` does at `now_us` to the rows that `read` shows. Pure: it changes nothing itself."""
    return _HANDLERS[type(command)](read, command, now_us)


def _reject(why: str, detail: str = "") -> Decision:
    return Decision(Rejected(why, detail), _NOTHING)


def _reserve(read: Read, command: Reserve, now_us: int) -> Decision:
    id, lines, ttl_us, draft, digest, on_expiry, version, max_accounts = command[:8]
    row = read(id)
    if row is not None:
        return _reserve_again(read, row, command)
    if version < (read(POLICY_KEY) or 0):  # type: ignore[operator]
        return _reject("stale", str(read(POLICY_KEY)))
    puts: dict[str, Row] = {}
    before: list[Account] = []
    after: list[Account] = []
    held: list[tuple[str, str, int]] = []
    short = -1
    marked = False
    behind = command.behind
    shadowed: tuple[str, ...] = ()
    for rule, amount in lines:
        key, end_us = rule.key, rule.end_us
        row = read(key)
        if type(row) is Account and row.rule is rule and (end_us is None or rule.start_us <= now_us < end_us):
            account = row  # as the last call left it
        else:
            standing = _standing(read, rule, now_us, puts, max_accounts)
            if type(standing) is not Account:
                return _reject(*standing)
            account = standing
        before.append(account)
        if rule.marks:
            marked = True
        account = puts[key] = hold(account, amount, now_us)
        after.append(account)
        held.append((key, rule.unit, amount))
        room = account.level if rule.kind == "refill" else rule.limit - account.spent - account.reserved
        if room < 0 or key == behind:
            if not rule.enforce:
                shadowed = (*shadowed, key)
            elif short < 0:
                short = len(before) - 1
    if marked:
        stopped, mark, steps, would = _marks(command, before, now_us)
        if stopped >= 0:
            return _refuse(command, before, stopped, now_us, puts, mark)
        if steps:
            return Decision(Stepped(steps), _NOTHING)
        shadowed = (*shadowed, *(key for key in would if key not in shadowed))
    if short >= 0:
        return _refuse(command, before, short, now_us, puts)
    if shadowed:
        draft = {**draft, "shadowed": list(shadowed)}
    fields = (id, tuple(held), now_us, now_us + ttl_us, on_expiry, digest, draft)
    puts[id] = reservation = _new(Reservation, fields)
    return _new(Decision, (_new(Granted, (reservation, tuple(after), shadowed)), puts))


def _marks(
    command: Reserve, before: list[Account], now_us: int
) -> tuple[int, int | None, dict[str, int], tuple[str, ...]]:
    """What the marks in force say: the first line that one stops and that mark, the steps to take, who would have acted."""
    steps: dict[str, int] = {}
    would: tuple[str, ...] = ()
    for line, account in enumerate(before):
        rule = account.rule
        held = in_force(age(account, now_us)) if rule.marks else ()
        if not held:
            continue
        if not rule.enforce:
            would = (*would, rule.key)
            continue
        stop = next((index for index in held if rule.marks[index].action in STOPPING), None)
        if stop is not None:
            return line, stop, steps, would
        if held[-1] >= command.complied.get(rule.key, 0):
            steps[rule.key] = held[-1] + 1
    return -1, None, steps, would


def _reserve_again(read: Read, row: Row, command: Reserve) -> Decision:
    if type(row) is Reservation and row.digest == command.digest:
        return Decision(Granted(row, _accounts(read, row.held)), _NOTHING)
    if type(row) is Entry and row.kind != "charge" and row.digest == command.digest:
        held = tuple((key, "", amount) for key, amount in row.amounts.items())
        again = Reservation(row.id, held, row.reserved_us, row.settled_us, "charge", row.digest, row.draft)
        return Decision(Granted(again, _accounts(read, held)), _NOTHING)
    return _reject("conflict", command.id)


def _standing(
    read: Read, rule: Rule, now_us: int, puts: dict[str, Row], max_accounts: int
) -> Account | tuple[str, str]:
    """The rule's account as it was left, new where there is none; or why there cannot be one."""
    end_us = rule.end_us
    if end_us is not None and not rule.start_us <= now_us < end_us:
        return "moved", rule.budget
    account = read(rule.key)
    if type(account) is not Account:
        count_key = "#" + rule.budget
        count = puts.get(count_key)
        count = (read(count_key) or 0) if count is None else count
        assert type(count) is int
        if count >= max_accounts:
            return "accounts", rule.budget
        puts[count_key] = count + 1
        return Account(rule, level=rule.limit if rule.kind == "refill" else 0, at_us=now_us)
    if account.rule is not rule:  # an equal one too, so that the next call finds it the same at a glance
        account = account._replace(rule=rule) if account.rule == rule else under(account, rule)
    return account


def _refuse(
    command: Reserve, before: list[Account], short: int, now_us: int, puts: dict[str, Row], mark: int | None = None
) -> Decision:
    accounts = [age(account, now_us) for account in before]
    account, asked = accounts[short], command.lines[short][1]
    lines = tuple(zip(accounts, (amount for _, amount in command.lines), strict=True))
    lacking = [(a, amount) for a, amount in lines if amount > a.available and a.rule.enforce]
    if mark is not None:  # it lets calls through again when the balance is below it
        lacking.append((account._replace(rule=account.rule._replace(limit=account.rule.marks[mark].at)), 1))
    answer = Refused(account, asked, *_relief(lacking, now_us), lines, mark)
    if command.quiet:
        return Decision(answer, _NOTHING)
    minute = now_us // MINUTE_US
    recorded = account.refused_in_minute if account.refused_minute == minute else 0
    refused = account._replace(refused=account.refused + 1, refused_minute=minute, refused_in_minute=recorded + 1)
    kept: dict[str, Row] = {account.rule.key: refused}
    count_key = "#" + account.rule.budget
    if count_key in puts:  # of the accounts that this command would have made, only the refusing one is kept
        kept[count_key] = puts[count_key]
        kept |= {a.rule.key: a for a in accounts if a.rule.budget == account.rule.budget and a is not account}
    if recorded < REFUSALS_PER_MINUTE:
        key = f"{command.id}!{now_us}.{refused.refused}"
        facts: dict[str, Any] = {"account": account.rule.key, "asked": asked, "available": account.available}
        if command.behind:
            facts["behind"] = command.behind
        if mark is not None:
            facts["mark"] = account.rule.marks[mark].action
        kept[key] = Entry(
            key,
            "refusal",
            None,
            "blocked",
            False,
            account.rule.budget,
            0,
            {},
            {},
            now_us,
            now_us,
            "",
            command.draft,
            facts,
        )
    return Decision(answer, kept)


def _relief(lacking: list[tuple[Account, int]], now_us: int) -> tuple[int | None, bool]:
    """When time alone makes room for all of these amounts, if ever; and whether the end of calls in flight may help."""
    waits = [(until(account, need, now_us), may_free(account, need)) for account, need in lacking]
    times = [us for us, _ in waits if us is not None]
    retry_us = max(times, default=0) if len(times) == len(waits) else None
    return retry_us, any(free for _, free in waits) and all(free or us is not None for us, free in waits)


def _accounts(read: Read, held: tuple[tuple[str, str, int], ...]) -> tuple[Account, ...]:
    return tuple(account for key, _, _ in held if type(account := read(key)) is Account)


def _settle(read: Read, command: Settle, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Reservation:
        actual = command.actuals.get
        amounts = {key: 0 if unit == "slots" else actual(unit, held) for key, unit, held in row.held}
        return _end(read, row, "settlement", amounts, command, now_us)
    if type(row) is not Entry:
        return _reject("unknown", command.id)
    if row.kind == "expiry":
        return _settle_late(read, row, command, now_us)
    if row.kind != "settlement":
        return _reject("ended", row.kind)
    return _settled_again(read, row, command)


def _settled_again(read: Read, entry: Entry, command: Settle) -> Decision:
    if (entry.cost_nanos, entry.usage, entry.outcome) != (command.cost_nanos, command.usage, command.outcome):
        return _reject("conflict", command.id)
    accounts = tuple(account for key in entry.amounts if type(account := read(key)) is Account)
    return Decision(Ended(entry, accounts, again=True), _NOTHING)


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
            after = _crossed(account, after, row.id, row.draft, now_us, puts)
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


def _crossed(
    before: Account, account: Account, id: str, draft: Mapping[str, Any], now_us: int, puts: dict[str, Row]
) -> Account:
    """The account with its newly reached marks counted, and an alert for each of them among the rows to put."""
    rule = account.rule
    told = still_crossed(age(before, now_us))
    now_reached = reached(rule, account.spent)
    if now_reached <= told:
        return account
    for index in range(told, now_reached):
        at, action = rule.marks[index]
        facts = {
            "account": rule.key,
            "budget": rule.budget,
            "scope": rule.scope,
            "unit": rule.unit,
            "limit": rule.limit,
            "spent": account.spent,
            "mark": index,
            "at": at,
            "action": action,
            "enforce": rule.enforce,
            "until_us": rule.end_us,
            "call": id,
            "tags": draft["tags"],
        }
        alert = Alert(f"{id}^{rule.key}^{index}", "threshold", now_us, facts)
        puts["^" + alert.id] = alert
    return account._replace(crossed=now_reached)


def _settle_late(read: Read, expired: Entry, command: Settle, now_us: int) -> Decision:
    """A settlement after expiry: the true figures less what the expiry booked, as a further entry."""
    key = expired.id + "~"
    usage = difference(command.usage, expired.usage)
    cost_nanos = command.cost_nanos - expired.cost_nanos
    done = read(key)
    if type(done) is Entry:
        if done.kind == "correction" and (done.cost_nanos, done.usage) == (cost_nanos, usage):
            return Decision(Ended(done, (), again=True), _NOTHING)
        return _reject("ended", done.kind)
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
        puts[account_key] = _crossed(account, after, key, expired.draft, now_us, puts)
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


def _release(read: Read, command: Release, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Reservation:
        amounts = {key: command.actuals.get(unit, 0) for key, unit, _ in row.held}
        return _end(read, row, "release", amounts, command, now_us)
    if type(row) is not Entry:
        return _reject("unknown", command.id)
    if row.kind == "release":
        return Decision(Ended(row, (), again=True), _NOTHING)
    if row.kind != "expiry":
        return _reject("ended", row.kind)
    done = read(row.id + "~")
    if type(done) is Entry:
        if done.kind == "reversal":
            return Decision(Ended(done, (), again=True), _NOTHING)
        return _reject("ended", done.kind)
    operator = read(OPERATOR_KEY)
    if type(operator) is str and not verifies(operator, "release", command.id, {"signature": command.proof}):
        return _reject("operator", command.id)
    amounts = {key: -amount for key, amount in row.amounts.items()}
    usage = difference({}, row.usage)
    return _correct(read, row, row.id + "~", amounts, command, -row.cost_nanos, usage, now_us)


def _extend(read: Read, command: Extend, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is not Reservation:
        return _reject("ended", row.kind) if type(row) is Entry else _reject("unknown", command.id)
    expires_us = max(row.expires_us, now_us + command.ttl_us)
    return Decision(Extended(expires_us), {row.id: row._replace(expires_us=expires_us)})


def _expire(read: Read, command: Expire, now_us: int) -> Decision:
    """The outcome is unknown: `charge` books the reserved amounts as estimated; slots are free at once (I5)."""
    row = read(command.id)
    if type(row) is not Reservation:
        return _reject("ended", row.kind) if type(row) is Entry else _reject("unknown", command.id)
    if now_us < row.expires_us:
        return _reject("live", command.id)
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


def _charge(read: Read, command: Charge, now_us: int) -> Decision:
    row = read(command.id)
    if type(row) is Entry and row.kind == "charge" and row.digest == command.digest:
        return Decision(Ended(row, (), again=True), _NOTHING)
    if row is not None:
        return _reject("conflict", command.id)
    puts: dict[str, Row] = {}
    accounts = []
    for rule, amount in command.lines:
        account = _incurring(read, rule, command, now_us, puts)
        if type(account) is not Account:
            return _reject(*account)
        uncovered = max(0, amount - max(0, age(account, now_us).available))
        after = book(account, 0, amount, now_us, now_us, uncovered)
        after = puts[rule.key] = _crossed(account, after, command.id, command.draft, now_us, puts)
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
    """As `_standing`, of an account on which a cost has been incurred already."""
    if command.version < (read(POLICY_KEY) or 0) and type(known := read(rule.key)) is Account:  # type: ignore[operator]
        rule = known.rule  # a cost is booked by whatever policy, but an older one changes no limit
    # what was incurred in a window belongs to it, however late it is told, or however far the store's clock is behind
    in_window_us = now_us if rule.end_us is None else max(rule.start_us, min(now_us, rule.end_us - 1))
    return _standing(read, rule, in_window_us, puts, command.max_accounts)


def _draw(read: Read, command: Draw, now_us: int) -> Decision:
    lease = read(command.id)
    new: list[Entry] = []
    for entry in command.entries:
        known = read(entry.id)
        if known is None:
            new.append(entry)
        elif known != entry:
            return _reject("conflict", entry.id)
    left = {key: held for key, _, held in lease.held} if type(lease) is Reservation else None
    if not new:
        held = tuple((rule.key, rule.unit, 0) for rule in command.rules)
        return Decision(Drawn(0, left, _accounts(read, held)), _NOTHING)
    puts: dict[str, Row] = {entry.id: entry for entry in new}
    accounts = []
    for rule in command.rules:
        assert rule.kind == "window", f"{rule.key} is no account of a lease"
        account = _incurring(read, rule, command, now_us, puts)
        if type(account) is not Account:
            return _reject(*account)
        actual = sum(entry.amounts.get(rule.key, 0) for entry in new)
        paid = min(left[rule.key], actual) if left is not None and rule.key in left else 0
        uncovered = actual - paid - max(0, account.available)
        after = book(account, paid, actual, now_us, now_us, max(0, uncovered, command.overruns.get(rule.key, 0)))
        after = puts[rule.key] = _crossed(account, after, new[-1].id, new[-1].draft, now_us, puts)
        accounts.append(after)
        if paid and left is not None:
            left[rule.key] -= paid
    if type(lease) is Reservation and left is not None:
        still = tuple((key, unit, left[key]) for key, unit, _ in lease.held)
        draft = {**lease.draft, "cost_nanos": max((held for _, unit, held in still if unit == "USD"), default=0)}
        puts[lease.id] = lease._replace(held=still, draft=draft)
    alerts = tuple(put for put in puts.values() if type(put) is Alert)
    return Decision(Drawn(len(new), left, tuple(accounts), alerts), puts)


def _tell(read: Read, command: Tell, now_us: int) -> Decision:
    key = "^" + command.id
    if read(key) is not None:
        return Decision(Told(True), _NOTHING)
    return Decision(Told(False), {key: Alert(command.id, command.kind, now_us, command.facts)})


_HANDLERS: dict[type, Callable[[Read, Any, int], Decision]] = {
    Reserve: _reserve,
    Settle: _settle,
    Release: _release,
    Extend: _extend,
    Expire: _expire,
    Charge: _charge,
    Draw: _draw,
    Tell: _tell,
}
