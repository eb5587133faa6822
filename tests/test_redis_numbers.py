"""Amounts beyond what a double holds: the server's arithmetic, and the law on accounts that hold nearly 2^63."""

from __future__ import annotations

import itertools
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis_server import fresh_url, server

from bursar.accounts import Mark, Rule, age
from bursar.commands import Command, Ended, Expire, Extend, Granted, Release, Reserve, Settle
from bursar.errors import StoreError
from bursar.stores.memory import MemoryStore
from bursar.stores.redis import RedisStore
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import SECOND_US, charge, reserve, rule, settle

MOST = 2**63 - 1
EDGES = [0, 1, 10**7, 2**51, 2**53, 2**53 + 1, 10**16, 2**62, MOST, 2**63, 2**64]
NUMBERS = st.one_of(
    st.integers(-(2**66), 2**66),
    st.integers(-(10**4), 10**4),
    st.tuples(st.sampled_from(EDGES), st.integers(-2, 2), st.sampled_from([1, -1])).map(lambda n: (n[0] + n[1]) * n[2]),
)
_HARNESS = """
local a, b = num(ARGV[1]), num(ARGV[2])
local quotient, rest = 0, 0
if ARGV[3] == '1' then quotient, rest = divide(a, b) end
return {dec(add(a, b)), dec(sub(a, b)), dec(mul(a, b)), less(a, b) and 1 or 0, dec(most(a, b)), dec(quotient), dec(rest)}
"""
_TEXT = files("bursar.stores.redis").joinpath("numbers.lua").read_text() + _HARNESS


@given(a=NUMBERS, b=NUMBERS)
@example(a=2**53 - 1, b=1)
@example(a=2**53, b=-(2**53))
@example(a=-(2**63), b=-1)
@example(a=10**21, b=10**7)
def test_the_servers_numbers_are_integers(a: int, b: int) -> None:
    divides = a >= 0 and b > 0
    with server().client() as client:
        told = client.eval(_TEXT, 0, str(a), str(b), "1" if divides else "")
    expected = [a + b, a - b, a * b, int(a < b), max(a, b), *(divmod(a, b) if divides else (0, 0))]
    assert told == [int(one) if at == 3 else str(one) for at, one in enumerate(expected)]


KINDS = ("window", "window", "rolling", "refill", "slots")
LARGE = st.one_of(
    st.integers(0, 50),
    st.tuples(st.sampled_from([2**51, 2**53, 2**62, MOST]), st.integers(-3, 0)).map(sum),
    st.integers(0, MOST),
)


@st.composite
def rules(draw: st.DrawFn) -> list[Rule]:
    found = []
    for number, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2))):
        limit = max(1, draw(LARGE))
        period = draw(st.sampled_from([1, 60, 86_400])) * SECOND_US if kind in ("rolling", "refill") else 0
        unit = {"slots": "slots", "refill": "requests"}.get(kind, "USD")
        more: dict[str, Any] = {"enforce": draw(st.integers(0, 5)) > 0}
        if kind in ("window", "rolling") and draw(st.booleans()):
            marks = sorted(draw(st.lists(st.tuples(LARGE, st.sampled_from(["notify", "block", "clamp"])), max_size=2)))
            more["marks"] = tuple(Mark(at, action) for at, action in marks)
        found.append(rule(f"b{number}", limit, kind, unit, period_us=period, **more))
    return found


def expected(memory: MemoryStore, command: Command) -> object:
    """What memory answers, which knows no bound; or None, where the books would pass 2^63, and what it did is undone."""
    before = dict(memory._rows), dict(memory._open), dict(memory._outbox), list(memory._ended)
    answer = memory.execute(command)
    if all(
        -(2**63) <= figure < 2**63
        for account in memory.accounts()
        for figure in (
            account.spent,
            account.reserved,
            account.overrun,
            account.level,
            *(n for _, n in account.buckets),
        )
    ):
        return answer
    memory._rows, memory._open, memory._outbox = before[:3]
    memory._ended.clear()
    memory._ended.extend(before[3])
    return None


def amount(data: st.DataObject, memory: MemoryStore, of: Rule, now_us: int) -> int:
    """Nothing, anything, or what is left, one less, one more."""
    if of.unit == "slots":
        return 1
    left = next((age(account, now_us).available for account in memory.accounts([of.key])), of.limit)
    edge = st.integers(-1, 1).map(lambda off: max(0, left + off))
    return data.draw(st.one_of(st.just(0), edge, edge, LARGE), label=of.budget)


@given(data=st.data(), made=rules())
def test_the_law_holds_to_the_last_unit_whatever_the_amounts(data: st.DataObject, made: list[Rule]) -> None:
    """I1, I2, I3 on memory and Redis alike; a sum that would pass 2^63 changes nothing and says so."""
    clock = ManualClock()
    memory, store = MemoryStore(clock), RedisStore(fresh_url(), clock=clock)
    ids = (f"c{number:02}" for number in itertools.count())
    known: list[str] = []
    for _ in range(data.draw(st.integers(4, 12))):
        kind = data.draw(
            st.sampled_from(["reserve", "reserve", "settle", "settle", "charge", "release", "expire", "extend"])
        )
        if data.draw(st.integers(0, 5)) == 0:  # somebody changes the limits
            made = [one._replace(limit=max(1, data.draw(LARGE))) for one in made]
        command: Command
        if kind in ("reserve", "charge") or not known:
            lines = tuple((one, amount(data, memory, one, clock.now_us())) for one in made)
            id = next(ids)
            known.append(id)
            complied = {one.key: data.draw(st.integers(0, 2)) for one in made}
            more = {"complied": complied, "ttl_us": data.draw(st.sampled_from([1, 10**9]))}
            command = charge(id, *lines) if kind == "charge" else reserve(id, *lines, **more)
        else:
            id = data.draw(st.sampled_from(known))
            command = {
                "settle": Settle(id, {"USD": data.draw(LARGE), "requests": data.draw(LARGE)}, data.draw(LARGE), {}),
                "release": Release(id),
                "expire": Expire(id),
                "extend": Extend(id, 5),
            }[kind]
        answer = expected(memory, command)
        if answer is None:
            with pytest.raises(StoreError, match="2\\^63") as caught:
                store.execute(command)
            assert caught.value.fault == "overflow"
        else:
            assert store.execute(command) == answer
        assert sorted(store.accounts()) == sorted(memory.accounts())
        assert list(store.entries()) == list(memory.entries())
        assert list(store.reservations()) == list(memory.reservations())
        assert list(store.alerts()) == list(memory.alerts())
        clock.advance(us=data.draw(st.sampled_from([0, 1, 999_983, 10**8, 10**11])))
    store.close()


def test_a_sum_beyond_2_63_overflows_and_harms_no_other_command() -> None:
    store = RedisStore(fresh_url())
    huge, small = rule("huge", MOST), rule("small", 100)
    store.execute(charge("c", (huge, MOST)))
    answers = store._apply([charge("d", (huge, 1)), reserve("r", (small, 1)), charge("e", (huge, 1), (small, 1))], True)
    assert [type(answer) for answer in answers] == [StoreError, Granted, StoreError]
    (account,) = store.accounts([small.key])
    assert (account.spent, account.reserved) == (0, 1)
    assert type(store.execute(settle("r", 1))) is Ended
    store.close()


def test_a_cost_beyond_what_a_double_holds_is_told_to_the_unit() -> None:
    clock = ManualClock()
    store = RedisStore(fresh_url(), clock=clock)
    cost = 2**60 + 1
    line = (rule("b", MOST, marks=(Mark(2**60, "notify"),)), cost)
    store.execute(Reserve("a", (line,), SECOND_US, {"tags": {}, "cost_nanos": cost, "usage": {"input_tokens": cost}}))
    clock.advance(1)
    assert store.sweep() == 1
    (entry,) = store.entries()
    assert (entry.cost_nanos, entry.usage, entry.amounts) == (cost, {"input_tokens": cost}, {line[0].key: cost})
    ((alert, _),) = store.alerts()
    assert (alert.facts["spent"], alert.facts["at"], alert.facts["limit"]) == (cost, 2**60, MOST)
    store.close()
