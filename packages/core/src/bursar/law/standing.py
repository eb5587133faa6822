"""Accounts as commands find them, and what else the parts of the law share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bursar.accounts import Account, Rule, age, reached, still_crossed, under
from bursar.commands import Alert, Decision, Rejected, Row

POLICY_KEY = "@policy"
OPERATOR_KEY = "@operator"

Read = Callable[[str], Row | None]
NOTHING: dict[str, Row] = {}


def reject(why: str, detail: str = "") -> Decision:
    return Decision(Rejected(why, detail), NOTHING)


def standing(read: Read, rule: Rule, now_us: int, puts: dict[str, Row], max_accounts: int) -> Account | tuple[str, str]:
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


def accounts_of(read: Read, held: tuple[tuple[str, str, int], ...]) -> tuple[Account, ...]:
    return tuple(account for key, _, _ in held if type(account := read(key)) is Account)


def crossed(
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
