"""Faults of a Redis store: each says what it is and what to do, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
from redis_server import Running, fresh_url, own, server

from bursar import Budget, Bursar, InvalidInput, StoreError, Usage
from bursar.accounts import Mark, Rule
from bursar.audit import audit
from bursar.clock import SystemClock
from bursar.commands import Ended, Granted, Refused, Rejected, Release, Reserve, Tell
from bursar.signing import OperatorKey
from bursar.stores import open_store
from bursar.stores.leases import LeasedStore
from bursar.stores.redis import RedisStore
from bursar.stores.redis.faults import fault_of
from bursar.stores.redis.store import LAYOUT
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import TTL_US, charge, reserve, rule, settle

DOLLAR = rule("b", 10**12)


@contextlib.contextmanager
def fails(fault: str, remedy: str) -> Iterator[None]:
    with pytest.raises(StoreError, match=remedy) as caught:
        yield
    assert caught.value.fault == fault
    assert str(caught.value).endswith(".")


@contextlib.contextmanager
def opened(url: str) -> Iterator[RedisStore]:
    store = RedisStore(url)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def url() -> str:
    return fresh_url()


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    with opened(url) as store:
        yield store


def spent(store: RedisStore, of: Rule = DOLLAR) -> tuple[int, int]:
    (account,) = store.accounts([of.key])
    return account.spent, account.reserved


# -- connections ---------------------------------------------------------------------------------------------------


def cut() -> None:
    """End the stores' connections on the server's side, as its restart does."""
    with server().client() as client:
        client.client_kill_filter(_type="normal", skipme=True)


def test_a_store_goes_on_after_its_connections_were_ended(store: RedisStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    assert store.open_reservations() == 1
    cut()
    assert type(store.execute(settle("a", 25))) is Ended
    assert spent(store) == (25, 0)
    cut()
    assert store.publish({"b": {"limit": "1"}}) == 1
    assert asyncio.run(store.aexecute(settle("a", 25))).again  # type: ignore[union-attr]


def test_i6_an_answer_that_is_lost_is_asked_for_again(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has written, and the connection ends before its answer is read."""
    store.execute(reserve("b", (DOLLAR, 50)))
    for command in (reserve("a", (DOLLAR, 60)), settle("b", 25)):  # what is settled twice would be taken from the other
        store.execute(Release("nobody"))  # there is a connection
        connection = store.server._connection

        def lost(*_: Any, of: Any = connection, **__: Any) -> NoReturn:
            type(of).read_response(of)
            raise redis.ConnectionError("the answer is lost")

        monkeypatch.setattr(connection, "read_response", lost)
        assert type(store.execute(command)) in (Granted, Ended)
        assert store.server._connection is not connection
    assert spent(store) == (25, 60)


@pytest.mark.parametrize("step", ["send_packed_command", "read_response"])
def test_an_interrupt_half_way_leaves_no_answer_to_the_next_command(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    connection = store.server._connection
    real = getattr(connection, step)

    def interrupted(*arguments: Any, **options: Any) -> NoReturn:
        if step == "send_packed_command":
            real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.server._send("PING")
    monkeypatch.undo()
    assert type(store.execute(settle("a", 25))) is Ended


def test_a_script_that_the_server_has_lost_is_sent_again(store: RedisStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    with server().client() as client:
        client.script_flush()
    assert type(store.execute(settle("a", 25))) is Ended
    assert spent(store) == (25, 0)


def test_a_server_that_was_killed_comes_back_with_every_acknowledged_settlement() -> None:
    """I7, at appendfsync always: kill -9 of the server."""
    with own() as running, opened(running.url) as store:
        assert store.durability == "full"
        for number in range(20):
            store.execute(reserve(f"a{number}", (DOLLAR, 60)))
            store.execute(settle(f"a{number}", 25))
        store.execute(reserve("open", (DOLLAR, 60)))
        running.kill()
        with fails("unreachable", "Check the server, and the store's URL"):
            store.execute(settle("open", 25))
        running.start()
        assert spent(store) == (500, 60)
        assert type(store.execute(settle("open", 25))) is Ended
        assert sum(entry.cost_nanos for entry in store.entries()) == 525


def test_a_server_that_comes_back_after_many_tries_is_used_again() -> None:
    running = Running(appendonly="no")
    with opened(running.url) as store:
        running.kill()
        for number in range(110):  # more than the driver's pool makes connections
            with fails("unreachable", "Check the server"):
                store.execute(reserve(f"a{number}", (DOLLAR, 1)))
        running.start()
        assert type(store.execute(reserve("b", (DOLLAR, 1)))) is Granted
    running.stop()


def test_a_server_that_is_not_there_is_unreachable_and_no_password_is_told() -> None:
    for url in ("redis://user:hunter2@127.0.0.1:1/0", "redis+cluster://:hunter2@127.0.0.1:1"):
        with pytest.raises(StoreError, match="Check the server") as caught:
            open_store(url)
        assert caught.value.fault == "unreachable"
        assert "hunter2" not in str(caught.value)
    for url in ("redis://user:hunter2/@127.0.0.1:6379/0", "redis://:hunter2@127.0.0.1:6379/0?colour=red"):
        with pytest.raises(InvalidInput, match="percent-encoded, and with options that redis-py knows") as wrong:
            open_store(url)
        assert "hunter2" not in str(wrong.value)


def test_a_forked_child_has_connections_of_its_own(store: RedisStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    assert store.open_reservations() == 1
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if type(store.execute(settle("a", 25))) is Ended and store.open_reservations() == 0 else 1
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert type(store.execute(reserve("b", (DOLLAR, 1)))) is Granted
    assert spent(store) == (25, 1)


def test_a_closed_store_reads_nothing_either(store: RedisStore) -> None:
    store.close()
    with fails("closed", "Open a new Bursar"):
        list(store.accounts())


def test_without_its_driver_the_store_says_what_to_install() -> None:
    code = "import sys; sys.modules['redis'] = None\nfrom bursar.stores import open_store\nopen_store('redis://x/y')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'bursar[redis]'" in ran.stderr.splitlines()[-1]


# -- what the server is set to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "durability", "warning"),
    [
        ({}, "full", ""),
        ({"appendfsync": "everysec"}, "everysec", "the last second"),
        ({"appendonly": "no"}, "memory", "a restart loses them"),
        ({"rename_command": "CONFIG hidden"}, "unknown", "does not tell"),
    ],
)
def test_durability_is_what_the_server_is_set_to(
    caplog: pytest.LogCaptureFixture, options: dict[str, str], durability: str, warning: str
) -> None:
    with own(**options) as running, caplog.at_level(logging.WARNING, "bursar"), opened(running.url) as store:
        assert store.durability == durability
        assert [warning in record.getMessage() for record in caplog.records] == ([True] if warning else [])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_would_evict_what_was_spent_is_not_used(policy: str) -> None:
    with own(maxmemory_policy=policy) as running, fails("evicts", "Set maxmemory-policy to noeviction"):
        RedisStore(running.url)


# -- what the server refuses ---------------------------------------------------------------------------------------


def full(running: Running) -> contextlib.AbstractContextManager[redis.Redis]:
    client = running.client()
    client.config_set("maxmemory", 1)
    return contextlib.closing(client)


def test_i7_a_full_server_holds_nothing_more_and_still_books_what_was_spent() -> None:
    rolling = rule("rolling", 10**12, "rolling", period_us=60_000_000)
    with own() as running, opened(running.url) as store:
        for id, line in (("a", DOLLAR), ("b", rolling), ("c", rolling), ("d", rolling)):
            store.execute(reserve(id, (line, 60), ttl_us=0 if id == "d" else TTL_US))
        with full(running) as client:
            for line in (
                (DOLLAR, 60),
                (rule("new", 10), 1),
                (rule("new", 10), 11),
            ):  # granted, and refused for want of room
                with fails("full", "drain its records"):
                    store.execute(reserve("x", line))
            assert type(store.execute(settle("a", 25))) is Ended
            assert type(store.execute(settle("b", 25))) is Ended
            assert type(store.execute(Release("c"))) is Ended
            assert store.sweep() == 1
            assert type(store.execute(settle("d", 25))) is Ended  # late
            assert type(store.execute(charge("e", (DOLLAR, 5)))) is Ended
            assert (spent(store), spent(store, rolling)) == ((30, 0), (50, 0))
            client.config_set("maxmemory", 0)
        assert type(store.execute(reserve("x", (DOLLAR, 60)))) is Granted
        assert [entry.id for entry in store.entries()] == ["a", "b", "c", "d", "d~", "e"]
        assert len(list(store.accounts())) == 2


def test_a_replica_is_read_only_and_says_so() -> None:
    with own() as primary, own() as replica:
        with contextlib.closing(replica.client()) as client:
            client.replicaof("127.0.0.1", primary.port)
            while client.info("replication")["master_link_status"] != "up":
                continue
        with opened(replica.url) as store, fails("readonly", "name the primary"):
            store.execute(reserve("a", (DOLLAR, 60)))


def test_a_server_that_becomes_a_replica_and_a_primary_again() -> None:
    with own() as running, opened(running.url) as store:
        store.execute(reserve("a", (DOLLAR, 60)))
        with contextlib.closing(running.client()) as client:
            client.replicaof("127.0.0.1", 1)
            with fails("readonly", "name the primary"):
                store.execute(settle("a", 25))
            client.replicaof("no", "one")
        assert type(store.execute(settle("a", 25))) is Ended


def test_a_user_without_rights() -> None:
    with own() as running, contextlib.closing(running.client()) as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">hunter2", "~*", "+@read", "+@connection")
        with pytest.raises(StoreError, match="rights") as caught:
            RedisStore(f"redis://reader:hunter2@127.0.0.1:{running.port}/0")
        assert caught.value.fault == "denied"
        with pytest.raises(StoreError, match="Correct the user") as wrong:
            RedisStore(f"redis://reader:hunter3@127.0.0.1:{running.port}/0")
        assert wrong.value.fault == "denied"
        assert "hunter" not in f"{caught.value}{wrong.value}"
        client.execute_command("CONFIG", "SET", "requirepass", "secret")
        with fails("denied", "user and (the|a) password"):
            RedisStore(running.url)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "loading"),
        ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", "full"),
        (redis.exceptions.ResponseError("BUSY Redis is busy running a script."), "locked"),
        ("NOREPLICAS Not enough good replicas to write.", "unreachable"),
        (redis.exceptions.ClusterDownError("The cluster is down"), "unreachable"),
        (redis.exceptions.RedisClusterException("Redis Cluster cannot be connected."), "unreachable"),
        (redis.exceptions.ResponseError("unknown command 'EVALSHA'"), "damaged"),
    ],
)
def test_what_the_server_says_becomes_a_fault(error: Exception | str, fault: str) -> None:
    failure = fault_of(error)
    assert failure.fault == fault
    assert str(failure).endswith(".")


def test_i2_rows_that_contradict_each_other_are_damage(store: RedisStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    key = f"bursar{{bursar}}:a:{DOLLAR.key}"
    with server().client() as client:
        number, spent, reserved, rest = client.get(key).split(",", 3)
        assert (spent, reserved) == ("0", "60")
        client.set(key, f"{number},0,59,{rest}")
        with fails("damaged", "restore"):
            store.execute(settle("a", 25))
        client.set(key, "somebody else's")
        with fails("damaged", "written by something else"):
            store.execute(settle("a", 25))
        client.delete(key)
        for command in (settle("a", 25), reserve("b", (DOLLAR, 1))):
            with fails("damaged", "is missing"):
                store.execute(command)
        row = "bursar{bursar}:i:c"
        client.set(row, "somebody else's")
        with fails("damaged", "Something else writes"):
            store.execute(settle("c", 25))
    assert store.open_reservations() == 1


def test_i9_a_damaged_reservation_keeps_no_other_from_its_expiry(store: RedisStore) -> None:
    other = rule("other", 10**12)
    for id, of in (("a", DOLLAR), ("b", other), ("c", other)):
        store.execute(reserve(id, (of, 60), ttl_us=1))
    with server().client() as client:
        client.delete(f"bursar{{bursar}}:a:{DOLLAR.key}")
    with fails("damaged", "is missing"):
        store.sweep()
    assert [open.id for open in store.reservations()] == ["a"]
    assert [account.spent for account in store.accounts([other.key])] == [120]


def test_keys_of_another_version(url: str, store: RedisStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    with server().client() as client:
        assert client.hget("bursar{bursar}:policy", "layout") == str(LAYOUT)
        client.hset("bursar{bursar}:policy", "layout", LAYOUT + 1)
        with fails("newer", "Upgrade Bursar"):
            RedisStore(url)
        client.hset("bursar{bursar}:policy", "layout", LAYOUT - 1)
        with fails("older", "bursar drain"):
            RedisStore(url)


# -- clocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off_s", [-70, 70])
def test_i8_a_host_clock_a_minute_off_is_an_error(
    store: RedisStore, url: str, monkeypatch: pytest.MonkeyPatch, off_s: int
) -> None:
    true_us = SystemClock.now_us
    monkeypatch.setattr(SystemClock, "now_us", lambda self: true_us(self) + off_s * 1_000_000)
    with fails("clock", "Set the clock"):
        store.execute(reserve("a", (DOLLAR, 1)))
    with fails("clock", "Set the clock"):
        RedisStore(url)
    monkeypatch.undo()
    assert type(store.execute(reserve("a", (DOLLAR, 1)))) is Granted


def test_i8_a_server_whose_clock_was_set_back(url: str, store: RedisStore) -> None:
    """What the slot has seen holds for everybody, whatever the server's clock says now."""
    assert store._clock is not None
    later_us = SystemClock().now_us() + 30_000_000
    with server().client() as client:
        client.hset("bursar{bursar}:policy", "clock", later_us)
        granted = store.execute(reserve("a", (DOLLAR, 1)))
        assert type(granted) is Granted
        assert granted.reservation.reserved_us >= later_us
        client.hset("bursar{bursar}:policy", "clock", later_us + 90_000_000)
        with fails("clock", "behind the store's"):
            store.execute(reserve("b", (DOLLAR, 1)))
        client.hset("bursar{bursar}:policy", "clock", 0)
    with opened(url) as other:
        other_us = other.now_us()
    assert other_us < later_us
    assert store.now_us() >= later_us
    again = store.execute(reserve("b", (DOLLAR, 1)))  # what this process has seen holds, too
    assert type(again) is Granted
    assert again.reservation.reserved_us >= later_us


def test_the_servers_time_is_known_without_asking(store: RedisStore) -> None:
    times = [store.now_us() for _ in range(100)]
    assert times == sorted(times)
    assert abs(times[-1] - SystemClock().now_us()) < 5_000_000


# -- many at once --------------------------------------------------------------------------------------------------


def test_i1_stores_that_make_the_same_accounts_at_once_count_them_once(url: str, store: RedisStore) -> None:
    answers: list[object] = []

    def work(of: RedisStore, name: str) -> None:
        for number in range(20):
            line = (rule("b", 9, of=f"r{number}"), 1)
            answers.append(of.execute(reserve(f"{name}{number}", line, max_accounts=10)))

    with opened(url) as other:
        threads = [threading.Thread(target=work, args=one) for one in ((store, "a"), (other, "b"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [type(answer) for answer in answers].count(Granted) == 20
    assert [answer for answer in answers if type(answer) is Rejected] == [Rejected("accounts", "b")] * 20
    assert len(list(store.accounts())) == 10


def test_an_alert_is_given_to_one_only(url: str, store: RedisStore) -> None:
    for number in range(40):
        store.execute(Tell(f"a{number:02}", "detector", {"n": number}))
    with opened(url) as other:
        found = [[alert.id for alert, _ in of.claim(20, 60_000_000)] for of in (store, other)]
    assert sorted(id for ids in found for id in ids) == [f"a{number:02}" for number in range(40)]
    assert store.claim(5, 1) == []
    store.retry(["a07"], 0)
    assert [(alert.id, claims) for alert, claims in store.claim(5, 1)] == [("a07", 1)]
    store.delivered(["a07"])
    assert [alert.id for alert, told in store.alerts() if told] == ["a07"]


def test_only_the_operator_takes_an_expiry_off_the_books(url: str) -> None:
    clock, key = ManualClock(), OperatorKey.generate()
    store = RedisStore(url, clock=clock)
    store.publish({"operator": {"public": key.public}}, "operator")
    draft = {"path": [], "tags": {}, "cost_nanos": 60, "usage": {"x": 3}}
    store.execute(Reserve("a", ((DOLLAR, 60),), TTL_US, draft, version=1))
    clock.advance(601)
    assert store.sweep() == 1
    for proof in ("", OperatorKey.generate().prove("a"), key.prove("b")):
        assert store.execute(Release("a", proof=proof)) == Rejected("operator", "a")
    answer = store.execute(Release("a", proof=key.prove("a")))
    assert type(answer) is Ended
    assert (answer.entry.kind, answer.entry.cost_nanos, answer.entry.usage) == ("reversal", -60, {"x": -3})
    assert store.execute(settle("a", 60)) == Rejected("ended", "reversal")
    store.close()


def test_an_operator_that_comes_between_a_look_and_the_release_is_heard(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature is verified here, between two calls of the server: who installs a key meanwhile must not be too late."""
    clock, key = ManualClock(), OperatorKey.generate()
    with contextlib.closing(RedisStore(url, clock=clock)) as store:
        store.execute(reserve("a", (DOLLAR, 60)))
        clock.advance(us=TTL_US)
        store.sweep()
        call = store._call

        def interposed(slot: str, texts: list[str]) -> list[Any]:
            found = call(slot, texts)
            monkeypatch.undo()
            store.publish({"operator": {"public": key.public}}, "operator")
            return found

        monkeypatch.setattr(store, "_call", interposed)
        assert store.execute(Release("a")) == Rejected("operator", "a")
        assert spent(store) == (60, 0)


def test_marks_are_told_once_and_act_on_every_store(url: str, store: RedisStore) -> None:
    marked = rule("b", 100, marks=(Mark(50, "notify"), Mark(80, "block")))
    with opened(url) as other:
        store.execute(reserve("a", (marked, 60)))
        ended = other.execute(settle("a", 60))
        assert type(ended) is Ended
        assert [alert.facts["mark"] for alert in ended.alerts] == [0]
        assert type(store.execute(reserve("b", (marked, 30)))) is Granted
        refused = other.execute(reserve("c", (marked, 1)))
        assert type(refused) is Refused
        assert (refused.mark, refused.may_free) == (1, True)


def test_a_publisher_reads_no_more_than_what_it_defines_and_a_reload_what_is_newer(store: RedisStore) -> None:
    for number in range(1, 6):
        assert store.publish({f"b{number}": {"limit": str(number)}}) == number
    assert store.publish({"b2": {"limit": "7"}, "b3": {"limit": "3"}}) == 6
    version, held = store.definitions(since=4)
    assert version == 6
    assert {name: (one.version, one.definition["limit"]) for name, one in held["budget"].items()} == {
        "b5": (5, "5"),
        "b2": (6, "7"),
    }
    assert store.definitions(since=6) == (6, {})


def test_leases_are_taken_from_redis_too(url: str, tmp_path: Path) -> None:
    with Bursar(f"{url}?leases={tmp_path}&durability=process", [Budget("b", "1000 USD")]) as bursar:
        store = bursar.store
        assert type(store) is LeasedStore
        for _ in range(300):
            reservation = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100)
            reservation.settle(Usage(input_tokens=1_000, output_tokens=100))
            store.tend()
    with contextlib.closing(open_store(url)) as shared:
        records = [entry for entry in shared.entries() if entry.kind == "settlement"]
        assert len(records) == 300
        assert any("lease" in entry.draft["tags"] for entry in shared.entries())
        assert shared.open_reservations() == 0
        assert audit(shared) == []
        (account,) = shared.accounts()
        assert account.spent == 300 * 3_500_000


def test_a_guarded_call_from_end_to_end(url: str) -> None:
    with Bursar(url, [Budget("b", "5 USD", per="team")]) as bursar, bursar.scope(team='it\'s "research" \\ é'):
        with bursar.call("openai", "gpt-4o", input_tokens=1_000) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=100))
        (record,) = bursar.records(team='it\'s "research" \\ é')
        assert record.cost_nanos == 3_500_000
        (status,) = bursar.status()
        assert (status.spent * 10**9, status.reserved) == (3_500_000, 0)
