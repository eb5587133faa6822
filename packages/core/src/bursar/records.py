"""What the books say, as read by users: usage records and the state of budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from typing import Any

from bursar.accounts import Account, age
from bursar.commands import Entry
from bursar.money import dollar_text, dollars
from bursar.texts import printable

MAX_HEADERS = 50
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_US = 253_402_300_799_999_999  # the end of the year 9999


def instant(at_us: int) -> datetime:
    """Microseconds since the epoch as a time in UTC; what no calendar holds as the last moment that one does."""
    return _EPOCH + timedelta(microseconds=min(max(at_us, 0), _LAST_US))


def amount(count: int, unit: str) -> Decimal:
    """An account's integer amount in its unit: US dollars for USD, the count itself for all others."""
    return dollars(count) if unit == "USD" else Decimal(count)


def spent_on(account: Account) -> int:
    """What an account has spent; of a rate, what is missing from its full level."""
    rule = account.rule
    return account.spent if rule.kind != "refill" else max(0, rule.limit - account.level - account.reserved)


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """One account of a budget. Amounts are Decimal in the unit; `window` is its start and end (None: no end)."""

    name: str
    scope: dict[str, str]
    unit: str
    limit: Decimal
    spent: Decimal
    reserved: Decimal
    available: Decimal
    window: tuple[datetime | None, datetime | None]
    overrun: Decimal
    refused: int

    @classmethod
    def of(cls, account: Account, now_us: int) -> BudgetStatus:
        """The state of an account as it stands now. A rate's `spent` is what is missing from its full level."""
        account = age(account, now_us)
        rule = account.rule
        return cls(
            rule.budget,
            json.loads(rule.scope),
            rule.unit,
            amount(rule.limit, rule.unit),
            amount(spent_on(account), rule.unit),
            amount(account.reserved, rule.unit),
            amount(account.available, rule.unit),
            (instant(rule.start_us) if rule.start_us else None, instant(rule.end_us) if rule.end_us else None),
            amount(account.overrun, rule.unit),
            account.refused,
        )


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One immutable fact of the books (DESIGN: usage record). Sums over all records are the truth: corrections hold differences.

    `kind`: settlement, release, expiry, correction, reversal, charge, refusal; carried: the sums of records that were pruned;
    retired: what of these sums stood on accounts that went, with the sign turned.
    `outcome`: completed, failed, blocked, cancelled. `path`: the runs from the outermost to the one the call belongs to.
    `amounts`: one dict per account with `budget`, `scope`, `unit`, `window_start` and the integer `amount` (USD in nano-dollars).
    `estimated`: the real cost is not known, what was reserved stands for it. `attempts`: 1 plus the client's own retries that
    were allowed for. `model_asked`: the model that `model` took the place of, by a threshold. `actions`: what thresholds did to
    the call; `shadowed`: the budgets in shadow mode that would have stopped or changed it.
    """

    id: str
    kind: str
    corrects: str | None
    outcome: str
    estimated: bool
    reason: str
    path: tuple[str, ...]
    tags: dict[str, str]
    model: str | None
    model_answered: str | None
    usage: dict[str, Any]
    cost_nanos: int
    price_version: str | None
    amounts: tuple[dict[str, Any], ...]
    attempts: int
    reserved_at: datetime
    settled_at: datetime
    latency_ms: int | None
    headers: dict[str, str]
    model_asked: str | None
    actions: tuple[str, ...]
    shadowed: tuple[str, ...]

    @classmethod
    def of(cls, entry: Entry) -> UsageRecord:
        draft, facts = entry.draft, entry.facts
        return cls(
            id=entry.id,
            kind=entry.kind,
            corrects=entry.corrects,
            outcome=entry.outcome,
            estimated=entry.estimated,
            reason=_refusal(facts) if entry.kind == "refusal" else entry.reason,
            path=tuple(draft.get("path", ())),
            tags=dict(draft["tags"]),
            model=draft["tags"].get("model"),
            model_answered=facts.get("model_answered"),
            usage=entry.usage,
            cost_nanos=entry.cost_nanos,
            price_version=draft.get("price_version"),
            amounts=tuple(_amount(key, count) for key, count in entry.amounts.items()),
            attempts=draft.get("attempts", 1),
            reserved_at=instant(entry.reserved_us),
            settled_at=instant(entry.settled_us),
            latency_ms=facts.get("latency_ms"),
            headers=facts.get("headers", {}),
            model_asked=draft.get("model_asked"),
            actions=tuple(draft.get("actions", ())),
            shadowed=tuple(_account(key)[0] for key in draft.get("shadowed", ())),
        )

    @property
    def cost_usd(self) -> Decimal:
        """The cost in US dollars, exact."""
        return dollars(self.cost_nanos)

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON data; money both as integer nano-dollars and as a decimal text of dollars."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["reserved_at"] = self.reserved_at.isoformat()
        plain["settled_at"] = self.settled_at.isoformat()
        plain["cost_usd"] = dollar_text(self.cost_nanos)
        plain["path"] = list(self.path)
        plain["amounts"] = list(self.amounts)
        plain["actions"], plain["shadowed"] = list(self.actions), list(self.shadowed)
        return plain


def _refusal(facts: Mapping[str, Any]) -> str:
    budget, unit, _, scope, _ = _account(facts["account"])
    where = ", ".join(f"{tag}={value}" for tag, value in scope.items())
    asked, available = (
        f"${dollar_text(count)}" if unit == "USD" else f"{count} {unit}"
        for count in (facts["asked"], facts["available"])
    )
    verb = {"ask": "asks: it ", "block": "blocks calls: it ", "kill": "has stopped everything: it "}.get(
        facts.get("mark", ""), ""
    )
    return f"the budget {budget!r}{f' ({where})' if where else ''} {verb}had {available} available, the call needed {asked}"


def _amount(key: str, count: int) -> dict[str, Any]:
    budget, unit, _, scope, start_us = _account(key)
    return {"budget": budget, "scope": dict(scope), "unit": unit, "window_start": start_us, "amount": count}


@lru_cache(maxsize=256)
def _account(key: str) -> tuple[Any, ...]:
    """What an account's key says: budget, unit, window, scope, start. Every call's record names the same few."""
    return tuple(json.loads(key))


def facts_of(
    *, model_answered: str | None = None, latency_us: int | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What is known only after a call, as an entry keeps it."""
    facts: dict[str, Any] = {}
    if model_answered:
        facts["model_answered"] = model_answered
    if latency_us is not None:
        facts["latency_ms"] = latency_us // 1_000
    if headers:
        told = ((name, value) for name, value in headers.items() if "ratelimit" in name or name == "retry-after")
        facts["headers"] = {
            printable(str(name), 100): printable(str(value), 200) for name, value in islice(told, MAX_HEADERS)
        }
    return facts
