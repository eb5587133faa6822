"""What the contract of stores is made of: rules, commands, and the fixtures of its tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bursar.accounts import Account, Kind, Rule
from bursar.clock import Clock
from bursar.commands import (
    Answer,
    Charge,
    Command,
    Entry,
    Reserve,
    Settle,
)
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock

SECOND_US = 1_000_000
TTL_US = 600 * SECOND_US

OpenStore = Callable[[Clock], Store]
Run = Callable[[Command], Answer]


def rule(budget: str, limit: int, kind: Kind = "window", unit: str = "USD", *, of: str = "", **more: Any) -> Rule:
    """The rule of an account of `budget`; `of` tells its accounts apart, `more` are further fields of Rule."""
    scope = {"run": of} if of else {}
    start_us = more.get("start_us", 0)
    key = json.dumps([budget, unit, f"{kind} {more.get('period_us', '')}", scope, start_us])
    return Rule(key, budget, json.dumps(scope), unit, kind, limit, **more)


def reserve(id: str, *lines: tuple[Rule, int], **more: Any) -> Reserve:
    """A reservation of these amounts, with an id that may be repeated (I6)."""
    held = max((amount for rule, amount in lines if rule.unit == "USD"), default=0)
    draft = {"path": ["r"], "tags": {"run": "r"}, "cost_nanos": held, "usage": {"output_tokens": 7}}
    fields: dict[str, Any] = {"ttl_us": TTL_US, "draft": draft, "digest": "d"} | more
    return Reserve(id, lines, **fields)


def settle(id: str, cost_nanos: int, **actuals: int) -> Settle:
    """The end of a reservation at this cost, and at these amounts of other units."""
    return Settle(id, {"USD": cost_nanos, **actuals}, cost_nanos, {"output_tokens": 5})


def charge(id: str, *lines: tuple[Rule, int], **more: Any) -> Charge:
    cost = max((amount for rule, amount in lines if rule.unit == "USD"), default=0)
    fields: dict[str, Any] = {"digest": "d"} | more
    return Charge(id, lines, cost, {}, {"path": ["r"], "tags": {"run": "r"}}, **fields)


class Base:
    """What every part of the contract starts from."""

    durable = True

    @pytest.fixture
    def open_store(self) -> OpenStore:
        raise NotImplementedError("a test class of a store gives the fixture `open_store`")

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def store(self, open_store: OpenStore, clock: ManualClock) -> Iterator[Store]:
        store = open_store(clock)
        yield store
        store.close()

    @pytest.fixture(params=["sync", "async"])
    def run(self, request: pytest.FixtureRequest, store: Store) -> Iterator[Run]:
        if request.param == "sync":
            yield store.execute
        else:
            with asyncio.Runner() as runner:
                yield lambda command: runner.run(store.aexecute(command))

    @staticmethod
    def account(store: Store, of: Rule) -> Account:
        found = list(store.accounts([of.key]))
        assert len(found) == 1
        return found[0]

    @staticmethod
    def entry(store: Store, id: str) -> Entry:
        return next(entry for entry in store.entries() if entry.id == id)
