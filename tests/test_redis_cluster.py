"""A Redis cluster by organisation: each has a slot of its own, what is published reaches all of them, and names are just names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis_server
from redis_server import cluster, fresh_cluster_url, fresh_url

from bursar import Budget, BudgetExceeded, Bursar, PolicyError, Usage
from bursar.accounts import Mark, Rule
from bursar.audit import audit
from bursar.commands import (
    Draw,
    Ended,
    Entry,
    Extend,
    Extended,
    Granted,
    Rejected,
    Release,
    Reserve,
    Settle,
    Tell,
    Told,
)
from bursar.signing import OperatorKey
from bursar.stores.redis import RedisStore
from bursar.stores.redis.scripts import SHARE
from bursar.stores.redis.slots import prefix
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import TTL_US, charge

HOSTILE = [
    "a}b", "{", "}", "{}", "a{b}c", "bursar", "bursar}:", "new\nline", "tab\t", "*?[a-z]", "%%", "%41", " ", "é", "日本", "\x00",
    "'; DROP", "x" * 10_000, "x" * 9_999 + "y", "(none)", "shared:",
]  # fmt: skip


def rule(org: str, limit: int = 10**12, **more: Any) -> Rule:
    scope = {"org": org}
    key = json.dumps(["b", "USD", "total UTC", scope, 0], ensure_ascii=False)
    return Rule(key, "b", json.dumps(scope, ensure_ascii=False), "USD", "window", limit, **more)


def reserve(id: str, org: str, amount: int = 60, limit: int = 10**12, **more: Any) -> Reserve:
    draft = {"path": [], "tags": {"org": org}, "cost_nanos": amount, "usage": {}}
    return Reserve(id, ((rule(org, limit), amount),), TTL_US, draft, **more)


def settle(id: str, cost_nanos: int = 25) -> Settle:
    return Settle(id, {"USD": cost_nanos}, cost_nanos, {})


@pytest.fixture
def url() -> str:
    return fresh_cluster_url()


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    store = RedisStore(url)
    yield store
    store.close()


@contextlib.contextmanager
def another(url: str, **options: Any) -> Iterator[RedisStore]:
    store = RedisStore(url, **options)
    try:
        yield store
    finally:
        store.close()


def spent(store: RedisStore, org: str) -> tuple[int, int]:
    (account,) = store.accounts([rule(org).key])
    return account.spent, account.reserved


def test_organisations_are_spread_over_the_nodes_and_each_stays_together(store: RedisStore) -> None:
    for number in range(60):
        store.execute(reserve(f"a{number}", f"org {number}"))
    nodes = []
    for node in cluster():
        with contextlib.closing(node.client()) as client:
            nodes.append({key.split("}")[0] for key in client.keys("*")})
    assert all(len(slots) > 5 for slots in nodes)
    assert not nodes[0] & nodes[1] | nodes[1] & nodes[2] | nodes[0] & nodes[2]


def test_names_of_every_kind_have_books_of_their_own(url: str, store: RedisStore) -> None:
    for number, org in enumerate(HOSTILE):
        assert type(store.execute(reserve(f"a{number}", org))) is Granted
    with another(url) as other:
        for number, org in enumerate(HOSTILE):
            assert spent(other, org) == (0, 60), org
            assert type(other.execute(settle(f"a{number}", number))) is Ended
            assert spent(store, org) == (number, 0), org
        assert len(list(other.accounts())) == len(HOSTILE)
        assert {entry.draft["tags"]["org"] for entry in other.entries()} == set(HOSTILE)
        assert [entry.id for entry in other.entries()] == sorted(f"a{number}" for number in range(len(HOSTILE)))
    assert len({prefix(org) for org in [*HOSTILE, ""]}) == len(HOSTILE) + 1


@pytest.mark.parametrize("value", HOSTILE)
def test_tags_and_ids_of_every_kind_on_one_server(value: str) -> None:
    with another(fresh_url()) as store:
        one = rule(value)
        draft = {"path": [], "tags": {"org": value, value: value}, "cost_nanos": 1, "usage": {}}
        assert type(store.execute(Reserve(value, ((one, 60),), TTL_US, draft))) is Granted
        assert type(store.execute(settle(value))) is Ended
        (entry,) = store.entries({value: value})
        assert (entry.id, entry.draft, entry.amounts) == (value, draft, {one.key: 25})


def test_calls_without_an_organisation_share_a_slot(store: RedisStore) -> None:
    draft = {"path": [], "tags": {}, "cost_nanos": 1, "usage": {}}
    assert type(store.execute(Reserve("a", ((rule("(none)"), 60),), TTL_US, draft))) is Granted
    assert type(store.execute(settle("a"))) is Ended


def test_what_is_not_kept_by_organisation_is_refused_and_says_what_to_do(url: str, store: RedisStore) -> None:
    wrong = Budget("model", "5 USD", per="model")
    with pytest.raises(PolicyError, match=r'per=\["org", \.\.\.\].*\?org=acme.*PostgreSQL\.'):
        store.publish({"model": wrong.definition()})
    with pytest.raises(PolicyError, match="'model'"):
        Bursar(url, [wrong])
    assert store.publish({"off": Budget("off", "5 USD", mode="off").definition()}) == 1
    with Bursar(url) as bursar, bursar.scope(run="r", budget="1 USD"), pytest.raises(PolicyError, match="per="):
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)  # a budget of a scope
    with pytest.raises(PolicyError, match="per="):
        store.execute(Reserve("a", ((rule("other"), 1),), TTL_US, {"tags": {"org": "acme"}}))
    with pytest.raises(PolicyError, match="per="):
        store.execute(charge("c", (rule("other"), 1)))
    with another(f"{url}?org=acme") as one:
        assert one.publish({"model": wrong.definition()}) == 1  # where all is in one slot, anything goes
    assert list(store.accounts()) == []


def test_a_refused_rule_harms_no_other_command_of_its_batch(store: RedisStore) -> None:
    wrong = Reserve("w", ((rule("other"), 1),), TTL_US, {"tags": {"org": "acme"}})
    answers = store._apply([reserve("a", "acme"), wrong, reserve("b", "globex")], True)
    assert [type(answer) for answer in answers] == [Granted, PolicyError, Granted]


def test_another_process_finds_what_it_is_told_to_end(url: str, store: RedisStore) -> None:
    for number in range(4):
        store.execute(reserve(f"a{number}", f"org {number}"))
    with another(url) as other:
        assert type(other.execute(settle("a0"))) is Ended
        assert type(other.execute(Release("a1"))) is Ended
        assert type(other.execute(settle("nobody"))) is Rejected
        assert other.open_reservations() == 2
        assert [one.id for one in other.reservations()] == ["a2", "a3"]


def test_a_sweep_goes_through_every_slot(url: str) -> None:
    clock = ManualClock()
    with another(url, clock=clock) as store, another(url, clock=clock) as other:
        for number in range(10):
            store.execute(reserve(f"a{number}", f"org {number}"))
        clock.advance(us=TTL_US)
        assert other.sweep() == 10
        assert store.sweep() == 0
        assert {spent(other, f"org {number}") for number in range(10)} == {(60, 0)}
        late = store.execute(settle("a3"))
        assert type(late) is Ended
        assert late.entry.kind == "correction"
        assert audit(store) == []


def test_alerts_are_told_in_the_slot_of_their_organisation(url: str, store: RedisStore) -> None:
    marked = rule("acme", 100, marks=(Mark(50, "notify"),))
    draft = {"path": [], "tags": {"org": "acme"}, "cost_nanos": 60, "usage": {}}
    store.execute(Reserve("a", ((marked, 60),), TTL_US, draft))
    ended = store.execute(settle("a", 60))
    assert type(ended) is Ended
    (crossed,) = ended.alerts
    assert store.execute(Tell("t", "detector", {"tags": {"org": "globex"}})) == Told(False)
    assert store.execute(Tell("u", "detector", {})) == Told(False)
    assert store.execute(Tell("u", "detector", {})) == Told(True)
    with another(url) as other:
        claimed = other.claim(10, 60_000_000)
        assert {alert.id for alert, _ in claimed} == {crossed.id, "t", "u"}
        assert store.claim(10, 60_000_000) == []
        store.retry(["t"], 0)
        assert [(alert.id, claims) for alert, claims in other.claim(1, 60_000_000)] == [("t", 1)]
        store.delivered([crossed.id, "t", "missing"])
        assert {alert.id for alert, told in other.alerts() if told} == {crossed.id, "t"}


def test_a_lease_is_drawn_in_its_slot(url: str, store: RedisStore) -> None:
    store.execute(reserve("lease", "acme", 300))
    draft = {"path": [], "tags": {"org": "acme"}, "cost_nanos": 0, "usage": {}}
    one = rule("acme")
    entry = Entry("x", "settlement", None, "completed", False, "", 3, {}, {one.key: 50}, 1, 1, "", draft, {})
    with another(url) as other:
        other.execute(Draw("lease", (one,), (entry,)))
        assert spent(store, "acme") == (50, 250)
        assert other.execute(Draw("lease", (one,), (entry._replace(cost_nanos=4),))) == Rejected("conflict", "x")


# -- what is published ---------------------------------------------------------------------------------------------


def definitions(number: int) -> dict[str, dict[str, Any]]:
    return {"b": Budget("b", f"{number} USD", per="org").definition()}


def test_a_published_limit_holds_in_every_slot_when_publish_returns(url: str, store: RedisStore) -> None:
    orgs = [f"org {number}" for number in range(12)]
    for org in orgs:
        store.execute(reserve(f"1 {org}", org))
    with another(url) as other:
        for version in (1, 2, 3):
            assert other.publish(definitions(version)) == version
            assert other.publish(definitions(version)) == version
            for org in orgs:
                assert store.execute(reserve(f"{version} stale {org}", org, version=version - 1)) == Rejected(
                    "stale", str(version)
                )
                assert type(store.execute(reserve(f"{version} {org}", org, version=version))) is Granted
    assert store.execute(reserve("x", "an org that is new", version=2)) == Rejected("stale", "3")


def test_a_slot_that_is_new_while_somebody_publishes_is_not_left_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order of the two processes' steps that lie between them: whoever comes to the list second has read or raises."""
    steps = ("SADD", "read", "raise")  # of the one who begins to work in a slot
    for published_after in range(len(steps) + 1):
        for listed_after in range(published_after, len(steps) + 1):
            fresh_cluster_url()
            with another(url) as joiner, another(url) as publisher:
                publisher.publish(definitions(1))
                done: list[str] = []
                publishing = _steps_of_publishing(publisher)

                def happened(
                    step: str, turns: Any = (published_after, listed_after), of: Any = publishing, done: Any = done
                ) -> None:
                    done.append(step)
                    for turn in turns:
                        if len(done) == turn:
                            next(of)

                _watch(joiner, monkeypatch, happened)
                for turn in (published_after, listed_after):
                    if turn == 0:
                        next(publishing)
                joiner.slots.join(prefix("acme"))
                for _ in publishing:  # what is left of it
                    pass
                assert done == list(steps)
                with another(url) as third:
                    answer = third.execute(reserve("a", "acme", version=1))
                    assert answer == Rejected("stale", "2"), (published_after, listed_after)


def _steps_of_publishing(publisher: RedisStore) -> Iterator[None]:
    """Write the version, then read the list and raise the copies: as `publish` does, in two steps."""
    raising, publisher.slots.by_org = publisher.slots.by_org, False
    publisher.publish(definitions(2))
    publisher.slots.by_org = raising
    yield
    publisher.slots.version()
    yield


def _watch(store: RedisStore, monkeypatch: pytest.MonkeyPatch, happened: Any) -> None:
    """Tell of each step of joining a slot, after it."""
    ask, run = store.server.ask, store.server.run

    def asked(*command: Any) -> Any:
        found = ask(*command)
        if command[0] in ("SADD", "HMGET"):
            happened("SADD" if command[0] == "SADD" else "read")
        return found

    def ran(script: Any, *arguments: Any) -> Any:
        found = run(script, *arguments)
        if script is SHARE:
            happened("raise")
        return found

    monkeypatch.setattr(store.server, "ask", asked)
    monkeypatch.setattr(store.server, "run", ran)


def test_a_publisher_that_died_half_way_is_made_up_for(url: str, store: RedisStore) -> None:
    store.execute(reserve("a", "acme"))
    with another(url) as dying:
        next(_steps_of_publishing(dying))
    assert type(store.execute(reserve("b", "acme"))) is Granted  # nobody has been told that it is published
    assert store.version() == 1  # whoever looks, goes on for it
    assert store.execute(reserve("c", "acme")) == Rejected("stale", "1")


def test_a_slot_whose_node_lost_everything_is_joined_again(url: str, store: RedisStore) -> None:
    store.publish(definitions(1))
    store.execute(reserve("a", "acme", version=1))
    client = store.server.client()
    client.delete(*client.keys(f"{prefix('acme')}*", target_nodes=client.ALL_NODES))
    assert store.execute(reserve("b", "acme")) == Rejected("stale", "1")


def test_publishers_at_once_count_on(url: str, store: RedisStore) -> None:
    store.execute(reserve("a", "acme"))
    with another(url) as other:

        def publish(of: RedisStore, name: str) -> None:
            for number in range(1, 11):
                of.publish({name: Budget(name, f"{number} USD", per="org").definition()})

        threads = [threading.Thread(target=publish, args=one) for one in ((store, "x"), (other, "y"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        version, held = store.definitions()
        assert version == 20
        assert {name: one.definition["limit"] for name, one in held["budget"].items()} == {"x": "10 USD", "y": "10 USD"}
        assert store.execute(reserve("b", "acme", version=19)) == Rejected("stale", "20")


def test_the_operators_key_is_known_in_every_slot(url: str) -> None:
    clock, key = ManualClock(), OperatorKey.generate()
    with another(url, clock=clock) as store, another(url, clock=clock) as other:
        store.execute(reserve("a", "acme"))
        other.publish({"operator": {"public": key.public}}, "operator")
        clock.advance(us=TTL_US)
        assert store.sweep() == 1
        assert store.execute(Release("a")) == Rejected("operator", "a")
        assert type(other.execute(Release("a", proof=key.prove("a")))) is Ended
        assert spent(store, "acme") == (0, 0)


# -- from end to end -----------------------------------------------------------------------------------------------


def test_a_guarded_call_from_end_to_end(url: str) -> None:
    budgets = [Budget("org", "0.01 USD", per="org"), Budget("team", "5 USD", per=["org", "team"])]
    with Bursar(url, budgets) as bursar:
        for org in ("acme", "globex"):
            with bursar.scope(org=org, team="research"):
                with bursar.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100) as call:
                    call.settle(Usage(input_tokens=1_000, output_tokens=100))
                with pytest.raises(BudgetExceeded, match="org"):
                    bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=100)

        async def many() -> None:
            async def one(org: str) -> None:
                with bursar.scope(org=org):
                    reservation = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
                    await reservation.asettle(Usage(input_tokens=10, output_tokens=10))

            await asyncio.gather(*(one(f"org {number % 7}") for number in range(40)))

        asyncio.run(many())
        assert (
            sum(record.cost_nanos for record in bursar.records() if record.kind == "settlement")
            == 7_000_000 + 40 * 125_000
        )
        assert {status.scope["org"] for status in bursar.status()} >= {"acme", "globex", "org 6"}
        assert audit(bursar.store) == []


def test_an_extension_by_another_process(url: str, store: RedisStore) -> None:
    store.execute(reserve("a", "acme"))
    with another(url) as other:
        assert type(other.execute(Extend("a", TTL_US * 2))) is Extended


def test_a_slot_that_moves_to_another_node_is_followed(store: RedisStore) -> None:
    """MOVED: the cluster hands a slot over while a store works in it."""
    store.execute(reserve("a", "acme"))
    client = store.server.client()
    slot = client.keyslot(prefix("acme"))
    source = client.nodes_manager.get_node_from_slot(slot)
    nodes = {node.port: node for node in redis_server.cluster()}
    target = next(node for port, node in nodes.items() if port != source.port)
    with contextlib.closing(nodes[source.port].client()) as old, contextlib.closing(target.client()) as new:
        old_id, new_id = old.execute_command("CLUSTER MYID"), new.execute_command("CLUSTER MYID")
        new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
        old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
        try:
            keys = old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1_000)
            old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        finally:
            for one in (old, new, *(node.client() for node in nodes.values())):
                one.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_id)
        assert type(store.execute(settle("a"))) is Ended
        assert spent(store, "acme") == (25, 0)
