"""How amounts are held on every account of a call, or refused."""

from __future__ import annotations

from typing import Any

from bursar.accounts import STOPPING, Account, age, hold, in_force, may_free, until
from bursar.commands import Decision, Entry, Granted, Refused, Reservation, Reserve, Row, Stepped
from bursar.law.standing import NOTHING, POLICY_KEY, Read, accounts_of, reject, standing

REFUSALS_PER_MINUTE = 60
MINUTE_US = 60_000_000

_new = tuple.__new__  # half the time of a NamedTuple's own, on the paths that every call takes


def reserve(read: Read, command: Reserve, now_us: int) -> Decision:
    id, lines, ttl_us, draft, digest, on_expiry, version, max_accounts = command[:8]
    row = read(id)
    if row is not None:
        return _reserve_again(read, row, command)
    if version < (read(POLICY_KEY) or 0):  # type: ignore[operator]
        return reject("stale", str(read(POLICY_KEY)))
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
            found = standing(read, rule, now_us, puts, max_accounts)
            if type(found) is not Account:
                return reject(*found)
            account = found
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
            return Decision(Stepped(steps), NOTHING)
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
        return Decision(Granted(row, accounts_of(read, row.held)), NOTHING)
    if type(row) is Entry and row.kind != "charge" and row.digest == command.digest:
        held = tuple((key, "", amount) for key, amount in row.amounts.items())
        again = Reservation(row.id, held, row.reserved_us, row.settled_us, "charge", row.digest, row.draft)
        return Decision(Granted(again, accounts_of(read, held)), NOTHING)
    return reject("conflict", command.id)


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
        return Decision(answer, NOTHING)
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
