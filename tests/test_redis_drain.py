"""The drain: every record reaches the SQL store once, however often the drain is cut off, and Redis lets go of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from redis_server import fresh_cluster_url, fresh_url, server
from test_redis_cluster import reserve as org_reserve

from bursar import Budget, BudgetExceeded, Bursar, Operator, StoreError, Usage
from bursar.cli import main
from bursar.commands import Draw, Ended, Entry, Granted, Release, Settle, Tell
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.stores.memory import MemoryStore
from bursar.stores.redis import RedisStore
from bursar.stores.redis.drain import BATCH, EXPIRY_KEPT_S, KEPT_S, drain
from bursar.stores.redis.scripts import DRAINED
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import TTL_US, charge, reserve, rule, settle

DOLLAR = rule("b", 10**12)
DAY_US = 86_400_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Iterator[RedisStore]:
    with contextlib.closing(RedisStore(fresh_url(), clock=clock)) as store:
        yield store


def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'records.db'}?durability=process"


def postgres(_: Path) -> str:
    postgres_server = pytest.importorskip("postgres_server")
    url: str = postgres_server.fresh_url()
    return url


@pytest.fixture(params=[sqlite, postgres], ids=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(open_store(request.param(tmp_path))) as target:
        yield target


def history(store: RedisStore, clock: ManualClock, name: str = "a") -> None:
    """Records of every kind, and a reservation that is open."""
    for id in ("settled", "released", "expired", "late", "open"):
        store.execute(reserve(f"{name} {id}", (DOLLAR, 60), ttl_us=TTL_US if id in ("expired", "late") else 10**12))
    store.execute(settle(f"{name} settled", 25))
    store.execute(Release(f"{name} released"))
    store.execute(reserve(f"{name} refused", (DOLLAR, 10**13)))
    store.execute(charge(f"{name} charged", (DOLLAR, 7)))
    clock.advance(us=TTL_US)
    store.sweep()
    store.execute(settle(f"{name} late", 30))


def test_every_record_moves_once_and_reads_as_it_did(store: RedisStore, clock: ManualClock, target: Store) -> None:
    history(store, clock)
    before = list(store.entries())
    assert {entry.kind for entry in before} == {
        "settlement", "release", "expiry", "correction", "refusal", "charge",
    }  # fmt: skip
    assert drain(store, target) == len(before)
    assert list(target.entries()) == before
    assert list(store.entries()) == []
    assert drain(store, target) == 0
    history(store, clock, "b")
    after = list(store.entries())
    assert drain(store, target) == len(after)
    assert list(target.entries()) == sorted([*before, *after], key=lambda entry: entry.id)


def test_what_is_open_stays_and_balances_stay(store: RedisStore, clock: ManualClock, target: Store) -> None:
    history(store, clock)
    before = list(store.accounts())
    drain(store, target)
    assert list(store.accounts()) == before
    assert [one.id for one in store.reservations()] == ["a open"]
    assert type(store.execute(settle("a open", 5))) is Ended


def test_i6_a_command_that_comes_twice_is_known_for_a_day(
    store: RedisStore, clock: ManualClock, tmp_path: Path
) -> None:
    history(store, clock)
    memory = MemoryStore(clock)
    before = store.execute(settle("a settled", 25))
    drain(store, memory)
    assert store.execute(settle("a settled", 25)) == before
    again = store.execute(charge("a charged", (DOLLAR, 7)))
    assert type(again) is Ended
    assert again.again
    late = store.execute(Settle("a expired", {"USD": 9}, 9, {}))
    assert type(late) is Ended
    assert late.entry.kind == "correction"
    assert drain(store, memory) == 1
    with server().client() as client:
        left = {id: client.ttl(f"bursar{{bursar}}:i:a {id}") for id in ("settled", "late~", "expired", "open")}
    assert left["open"] == -1
    assert KEPT_S - 100 < left["settled"] <= KEPT_S
    assert KEPT_S - 100 < left["late~"] <= KEPT_S
    assert EXPIRY_KEPT_S - 100 < left["expired"] <= EXPIRY_KEPT_S


@pytest.mark.parametrize("cut", ["before the target", "after the target"])
def test_a_drain_that_is_cut_off_goes_on_where_it_was(
    store: RedisStore, clock: ManualClock, target: Store, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    history(store, clock)
    before = list(store.entries())
    where: Any = target if cut == "before the target" else store.server
    name = "execute" if cut == "before the target" else "run"
    real: Callable[..., Any] = getattr(where, name)

    def died(*arguments: Any) -> Any:
        if cut == "before the target" or arguments[0] is DRAINED:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(where, name, died)
    with pytest.raises(KeyboardInterrupt):
        drain(store, target)
    monkeypatch.undo()
    assert list(store.entries()) == before
    assert drain(store, target) == (len(before) if cut == "before the target" else 0)
    assert list(target.entries()) == before
    assert list(store.entries()) == []


def test_more_records_than_a_batch(store: RedisStore) -> None:
    for start in range(0, 2 * BATCH + 3, 100):
        commands = [charge(f"{number:05}", (DOLLAR, 1)) for number in range(start, min(start + 100, 2 * BATCH + 3))]
        assert {type(answer) for answer in store._apply(commands, True)} == {Ended}
    memory = MemoryStore()
    assert drain(store, memory) == 2 * BATCH + 3
    assert [entry.id for entry in memory.entries()] == [f"{number:05}" for number in range(2 * BATCH + 3)]


def test_another_record_of_the_same_id_is_not_passed_over(store: RedisStore, clock: ManualClock, target: Store) -> None:
    store.execute(charge("x", (DOLLAR, 7)))
    other = MemoryStore(clock)
    other.execute(charge("x", (DOLLAR, 8)))

    target.execute(Draw("drain", (), tuple(other.entries())))
    with pytest.raises(StoreError, match="a target of its own") as caught:
        drain(store, target)
    assert caught.value.fault == "damaged"
    assert [entry.id for entry in store.entries()] == ["x"]


def test_a_cluster_is_drained_slot_by_slot(tmp_path: Path) -> None:
    with (
        contextlib.closing(RedisStore(fresh_cluster_url())) as store,
        contextlib.closing(open_store(sqlite(tmp_path))) as target,
    ):
        for number in range(9):
            assert type(store.execute(org_reserve(f"a{number}", f"org {number}"))) is Granted
            store.execute(Settle(f"a{number}", {"USD": number}, number, {}))
        before: list[Entry] = list(store.entries())
        assert drain(store, target) == 9
        assert list(target.entries()) == before
        assert list(store.entries()) == []


def test_the_command_and_the_reports_after_it(tmp_path: Path) -> None:
    source, target = fresh_url(), sqlite(tmp_path)
    with Bursar(source, [Budget("b", "0.01 USD", per="agent")]) as bursar, bursar.scope(agent="planner", run="r"):
        with bursar.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=100))
        with pytest.raises(BudgetExceeded):
            bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=100)
        before = list(bursar.records())
        ran = CliRunner().invoke(main, ["drain", "--from", source, "--to", target])
        assert ran.exit_code == 0, ran.output
        assert ran.output == "2 records moved.\n"
        assert list(bursar.records()) == []
        with Bursar(target) as reports:
            assert list(reports.records(agent="planner")) == before
        (status,) = bursar.status()
        assert status.spent == before[0].cost_usd or status.spent == before[1].cost_usd
    for words in (["--from", target, "--to", target], ["--from", source, "--to", source]):
        assert CliRunner().invoke(main, ["drain", *words]).exit_code == 2


def test_accounts_at_rest_are_retired(store: RedisStore, clock: ManualClock, target: Store) -> None:
    budgets = [
        Budget("run", "1 USD", per="run"),
        Budget("pace", "5 requests/minute", per="run"),
        Budget("team", "90 USD", per="team"),
        Budget("day", "9 USD", window="day", per="team"),
    ]

    def spend(run: str) -> None:
        with bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=60_000, tags={"run": run}) as call:
            call.settle(Usage(input_tokens=10, output_tokens=60_000))

    def there(budget: str) -> list[str]:
        return sorted(account.rule.scope for account in store.accounts() if account.rule.budget == budget)

    def prune() -> int:
        return Operator(store, by="ann").prune(clock.now_us() - 190 * DAY_US)[0].accounts

    with Bursar(store, budgets, clock=clock, max_accounts=2) as bursar, bursar.scope(team="red"):
        spend("old")
        clock.advance(us=200 * DAY_US)
        assert prune() == 0  # nobody has drained: the records name them all
        assert drain(store, target) == 1
        spend("new")
        with pytest.raises(StoreError, match="bursar prune"):
            spend("next")
        drain(store, target)
        of_new = [account.rule for account in store.accounts() if "new" in account.rule.scope]
        store.execute(reserve("open", *((one, 0) for one in of_new), ttl_us=400 * DAY_US, version=99))
        assert prune() == 3
        assert there("run") == there("pace") == ['{"run": "new"}']
        assert len(there("team")) == len(there("day")) == 1
        spend("old")  # which begins anew
        drain(store, target)
        clock.advance(us=200 * DAY_US)
        assert prune() == 2 + 1
        assert there("run") == there("pace") == ['{"run": "new"}']  # which the open reservation names
        spend("next")
        assert [account.spent for account in store.accounts() if account.rule.budget == "team"] == [
            sum(entry.cost_nanos for entry in [*target.entries(), *store.entries()])
        ]


def test_what_an_operator_granted_a_run_is_not_granted_again(
    store: RedisStore, clock: ManualClock, target: Store
) -> None:
    with Bursar(store, [Budget("run", "1 USD", per="run")], clock=clock) as bursar:
        operator = Operator(store, Operator(store, by="ann").appoint(), by="ann")
        for run in ("raised", "as it was"):
            with bursar.scope(run=run):
                bursar.charge("1 USD")
        operator.raise_limit("run", "1 USD", {"run": "raised"})
        drain(store, target)
        clock.advance(us=200 * DAY_US)
        assert operator.prune(clock.now_us() - 190 * DAY_US)[0].accounts == 1
        assert [account.rule.scope for account in store.accounts()] == ['{"run": "raised"}']


def test_what_has_expired_long_before_its_drain_may_be_corrected_after_it(
    store: RedisStore, clock: ManualClock, target: Store
) -> None:
    of_day = {"start_us": clock.now_us(), "end_us": clock.now_us() + DAY_US}
    lines = [(one, 10) for one in (rule("day", 10**9, **of_day), rule("run", 10**9, of="r"))]
    for id in ("late", "unbilled"):
        store.execute(reserve(id, *lines, ttl_us=1_000_000))
    clock.advance(2)
    assert store.sweep() == 2
    clock.advance(us=200 * DAY_US)
    assert drain(store, target) == 2
    assert Operator(store, by="ann").prune(clock.now_us() - 190 * DAY_US)[0].accounts == 0
    clock.advance(us=90 * DAY_US)
    for command in (settle("late", 6), Release("unbilled")):
        assert type(store.execute(command)) is Ended
    assert [account.spent for account in store.accounts()] == [6, 6]
    drain(store, target)
    clock.advance(us=200 * DAY_US)
    assert Operator(store, by="ann").prune(clock.now_us() - 190 * DAY_US)[0].accounts == 2


def test_old_alerts_are_forgotten(store: RedisStore, clock: ManualClock) -> None:
    for name, days in (("told", 0), ("untold", 200), ("new", 0)):
        store.execute(Tell(name, "frozen", {}))
        clock.advance(us=days * DAY_US)
    store.delivered(["told"])
    Operator(store, by="ann").prune(clock.now_us() - 190 * DAY_US)
    assert [alert.id for alert, _ in store.alerts()] == [alert.id for alert, _ in store.claim(9, DAY_US)] == ["new"]


def test_an_account_that_moves_meanwhile_stays(store: RedisStore, clock: ManualClock, target: Store) -> None:
    runs = [rule("run", 10**12, of=f"r{number}") for number in range(2_500)]
    for number, one in enumerate(runs):
        store.execute(charge(f"c{number}", (one, 5)))
    drain(store, target)
    clock.advance(us=200 * DAY_US)
    stop = threading.Event()

    def work() -> None:
        for number, one in enumerate(runs[::2]):
            for command in (reserve(f"m{number}", (one, 60), version=99), settle(f"m{number}", 25)):
                assert type(store.execute(command)) in (Granted, Ended)
            if stop.is_set():
                return

    thread = threading.Thread(target=work)
    thread.start()
    pruned, _ = Operator(store, by="ann").prune(clock.now_us() - 190 * DAY_US)
    stop.set()
    thread.join()
    assert pruned.accounts >= len(runs) // 2
    spent = {account.rule.key: account.spent for account in store.accounts()}
    for entry in store.entries():
        for key in entry.amounts:
            assert spent.pop(key) in (25, 30)
    assert not spent or set(spent.values()) == {5}
