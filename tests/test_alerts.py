"""Delivery of alerts: whatever the receivers do, every alert arrives, is signed rightly, and holds nobody up."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from receiver import SECRET, Got, Receiver, an_alert, tell, untold

from bursar import Budget, BudgetExceeded, Bursar, StoreError, Threshold
from bursar.alerts import Alert, Alerts, Deliverer, Message, Route, Undelivered, Webhook, deliverer
from bursar.alerts.message import MAX_ALERTS
from bursar.commands import Tell
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.testing import ManualClock

MINUTE_S = 60


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Store:
    return open_store("memory:", clock)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


class Heard:
    """A sink in this process: `alerts` are those of the messages that it took; it raises what `errors` hold, in turn."""

    name = "heard"

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.messages: list[Message] = []
        self.tried: list[tuple[int, str, str]] = []

    def send(self, message: Message, now_us: int) -> None:
        self.tried.append((now_us, message.id, message.body()))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.messages.append(message)

    @property
    def alerts(self) -> list[str]:
        return [one.id for message in self.messages for one in message.alerts]


def told(store: Store, *sinks: Any, seed: int = 1) -> Deliverer:
    return Deliverer(store, Alerts(sinks), Random(seed))


def run(delivery: Deliverer, clock: ManualClock, seconds: int, step_s: int = 5) -> None:
    for _ in range(seconds // step_s):
        delivery.tend()
        clock.advance(step_s)
    delivery.tend()


def assert_signed(got: list[Got], clock: ManualClock) -> None:
    """Every request, and each at the time of its own attempt."""
    assert got
    assert all(one.is_signed() for one in got)
    assert all(ManualClock().now_us() <= one.at_s * 1_000_000 <= clock.now_us() for one in got)


@pytest.mark.parametrize("kind", ["memory:", "sqlite:///bursar.db?durability=process"])
def test_a_receiver_that_is_down_for_ten_minutes_gets_every_alert(
    kind: str, clock: ManualClock, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another receiver gets them meanwhile, as if nothing were wrong."""
    monkeypatch.chdir(tmp_path)
    store = open_store(kind, clock)
    heard = Heard()
    delivery = told(store, Webhook(receiver.url, SECRET), heard)
    receiver.close()
    sent = []
    for round in range(40):
        for budget in range(3):
            sent.append(tell(store, round, budget=f"budget-{budget}"))
        delivery.tend()
        clock.advance(15)
    assert receiver.got == []
    assert len(heard.alerts) >= len(sent) - 3 * 4  # the last minute's wait to be told together
    receiver.open()
    run(delivery, clock, 5 * MINUTE_S)
    assert (
        sorted(receiver.taken) == sorted(heard.alerts) == sorted(sent)
    )  # once each: the failed attempts reached nobody
    assert not untold(store)
    assert_signed(receiver.got, clock)
    store.close()


@pytest.mark.parametrize("status", [0, 307, 400, 404, 429, 500, 503])
def test_an_answer_that_is_no_success_is_tried_again_with_the_same_id(
    status: int, store: Store, clock: ManualClock
) -> None:
    """The receiver may have it already (0: the line was cut after the request): it can tell by the id. I.e. duplicates."""
    with Receiver(status, status, 200, location="/elsewhere") as receiver:
        delivery = told(store, Webhook(receiver.url, SECRET))
        tell(store, 1)
        run(delivery, clock, MINUTE_S)
        assert [(one.path, one.status) for one in receiver.got] == [
            ("/hook", status),
            ("/hook", status),
            ("/hook", 200),
        ]
        assert {one.id for one in receiver.got} == {"alert-threshold-team-1"}
        assert len({one.body for one in receiver.got}) == 1
        assert len({one.at_s for one in receiver.got}) == 3  # each attempt is signed with its own time
        assert_signed(receiver.got, clock)
        assert not untold(store)


def test_a_receiver_says_when_to_come_again(store: Store, clock: ManualClock) -> None:
    with Receiver(429, 200, retry_after="300") as receiver:
        delivery = told(store, Webhook(receiver.url, SECRET))
        tell(store, 1)
        run(delivery, clock, 299, step_s=1)
        assert len(receiver.got) == 1
        run(delivery, clock, 2, step_s=1)
        assert len(receiver.got) == 2


def test_what_is_gone_is_left_alone_and_its_alerts_are_logged(
    store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver(410) as receiver:
        delivery = told(store, Webhook(receiver.url, SECRET))
        for number in range(3):
            tell(store, number, budget=f"b{number}")
        run(delivery, clock, MINUTE_S)
        tell(store, 9, budget="b9")
        run(delivery, clock, MINUTE_S)
        assert len(receiver.got) == 1
        assert all(f"Bursar: b{number}: a threshold is crossed" in caplog.text for number in (0, 1, 2, 9))
        assert "nothing more goes there" in caplog.text
        assert not untold(store)


def test_a_slow_receiver_holds_up_neither_calls_nor_other_sinks(
    store: Store, clock: ManualClock, receiver: Receiver
) -> None:
    done = threading.Semaphore(0)
    delivery = told(store, Webhook(receiver.url, SECRET), lambda message: done.release())
    receiver.held.clear()  # it takes the request, and does not answer
    delivery.start()
    try:
        for number in range(3):
            tell(store, number, budget=f"b{number}")
            delivery.wake()
            assert done.acquire(timeout=10)
        assert receiver.arrived.acquire(timeout=10)
        assert len(receiver.got) == 1  # nor is it asked a second time meanwhile
        receiver.held.set()
        assert receiver.arrived.acquire(timeout=10)
        assert receiver.arrived.acquire(timeout=10)
    finally:
        delivery.close()
    assert len(receiver.taken) == 3
    assert not untold(store)


def test_closing_sends_what_waits_and_gives_back_the_rest(store: Store, clock: ManualClock) -> None:
    with Receiver() as well, Receiver(500) as ill:
        delivery = told(store, Webhook(well.url, SECRET), Route(Webhook(ill.url, SECRET), budgets=["ill"]))
        delivery.start()
        tell(store, 1)
        tell(store, 2, budget="ill")
        delivery.close()
        assert sorted(well.taken) == ["alert-threshold-ill-2", "alert-threshold-team-1"]
        assert [one.id for one, _ in store.claim(9, 1)] == ["alert-threshold-ill-2"]  # by whoever is next


def test_the_background_ends_with_its_bursar(store: Store, clock: ManualClock) -> None:
    delivery = told(store, Heard())
    delivery.start()
    delivery.start()  # once
    mine = [thread for thread in threading.enumerate() if thread.name == "bursar-alerts"]
    assert mine
    delivery.wake()
    wake = delivery._wake
    del delivery
    gc.collect()
    wake.set()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def test_a_fork_s_child_begins_anew() -> None:
    """It neither hangs on what its parent's threads hold nor tells what its parent had claimed."""
    code = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from receiver import tell
from bursar.alerts import Alerts, Deliverer
from bursar.stores import open_store
store, stuck, sent = open_store("memory:"), threading.Event(), threading.Semaphore(0)
told = []
def sink(message):
    told.extend(alert.id for alert in message.alerts)
    sent.release()
    os.getpid() == parent and stuck.wait(20)
parent = os.getpid()
delivery = Deliverer(store, Alerts([sink]))
delivery.start()
tell(store, 1)
delivery.wake()
assert sent.acquire(timeout=10)  # and its thread stays in the sink
delivery._lock.acquire()
delivery._wake._cond.acquire()
child = os.fork()
if child == 0:
    told.clear()
    delivery.wake()
    delivery.start()
    tell(store, 2)
    delivery.wake()
    assert sent.acquire(timeout=10)
    delivery.close()
    os._exit(0 if told == ["alert-threshold-team-2"] else 1)
delivery._wake._cond.release()
delivery._lock.release()
_, status = os.waitpid(child, 0)
stuck.set()
delivery.close()
assert told == ["alert-threshold-team-1"], told
print(os.waitstatus_to_exitcode(status))
"""
    code = code.replace("{tests!r}", repr(str(Path(__file__).parent)))
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "0\n"


def test_a_fork_s_child_delivers_what_its_calls_cause_though_its_parent_is_gone(tmp_path: Path) -> None:
    code = """
import os, sys, threading
from bursar import Budget, Bursar
from bursar.alerts import Alerts
sent = threading.Event()
def sink(message):
    print(message.kind, message.budget, flush=True)
    sent.set()
bursar = Bursar(sys.argv[1], [Budget("b", "1 USD", thresholds=[{"at": "50%", "action": "notify"}])], alerts=Alerts([sink]))
if os.fork():
    os._exit(0)
bursar.charge("0.60 USD")
assert sent.wait(20)
bursar.close()
"""
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/b.db"]
    assert subprocess.check_output(command, text=True, timeout=60) == "threshold b\n"


def test_a_store_that_is_out_of_reach_loses_nothing(store: Store, clock: ManualClock) -> None:
    heard = Heard()
    delivery = told(store, heard)
    tell(store, 1)
    delivered = store.delivered
    down = StoreError("The store is gone. Bring it back.", fault="unreachable")

    def fail(ids: Any) -> None:
        raise down

    store.delivered = fail  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        delivery.tend()
    assert untold(store)
    store.delivered = delivered  # type: ignore[method-assign]
    run(delivery, clock, MINUTE_S)
    assert heard.alerts == ["alert-threshold-team-1"]
    assert not untold(store)


def test_an_alert_that_nobody_can_read_holds_up_no_other(store: Store, clock: ManualClock) -> None:
    heard = Heard()
    store.execute(Tell("forged", "threshold", ["no facts"]))  # type: ignore[arg-type]
    clock.advance(1)
    store.execute(Tell("real", "frozen", {"name": "agent=x"}))
    run(told(store, heard), clock, 10)
    assert heard.alerts == ["real"]
    assert untold(store) == []


def test_delivery_outlives_whatever_goes_wrong_in_it(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, claimed = [TypeError("of a kind that nobody expects")], threading.Event()

    def claim(*_: int) -> list[Any]:
        if claims:
            raise claims.pop()
        claimed.set()
        return []

    monkeypatch.setattr(store, "claim", claim)
    delivery = told(store, Heard())
    delivery.start()
    delivery.wake()
    while claims and not claimed.wait(0.01):
        delivery.wake()
    delivery.wake()
    assert claimed.wait(5)
    delivery.close()


def test_a_process_that_dies_is_followed_by_another(store: Store, clock: ManualClock) -> None:
    """What the first had delivered to one sink comes again, with the same id; what neither had is not lost."""
    first, second = Heard(), Heard(*[OSError("down")] * 100)
    dying = told(store, first, second)
    tell(store, 1)
    run(dying, clock, MINUTE_S)
    assert first.alerts == ["alert-threshold-team-1"]
    heir = told(store, first, second)
    heir.tend()
    assert len(first.alerts) == 1  # hidden by the lease of the first
    second.errors.clear()
    clock.advance(deliverer.LEASE_US / 1e6)
    heir.tend()
    assert first.alerts == ["alert-threshold-team-1"] * 2
    assert first.messages[0].id == first.messages[1].id
    assert second.alerts == ["alert-threshold-team-1"]
    assert not untold(store)


def test_processes_share_the_work(store: Store, clock: ManualClock) -> None:
    """While a sink is down for longer than the lease, its holder keeps what it holds: the other sinks hear nothing twice."""
    heard, down = Heard(), Heard(*[OSError("down")] * 1_000)
    all_of_them = [told(store, heard, down, seed=seed) for seed in range(4)]
    order = Random(7)
    for number in range(60):
        if number < 40:
            tell(store, number, budget=f"b{number}")
        else:
            down.errors.clear()
        for one in order.sample(all_of_them, 4):
            one.tend()
        clock.advance(15)
    assert all(one._lanes for one in all_of_them)
    assert len(heard.alerts) == len(set(heard.alerts)) == 40
    assert sorted(down.alerts) == sorted(heard.alerts)
    assert not untold(store)


def test_no_storm_reaches_people(store: Store, clock: ManualClock) -> None:
    """6,000 alerts of a detector in ten minutes about one budget: a few messages with the counts; then over."""
    heard = Heard()
    delivery = told(store, heard)
    for second in range(600):
        for number in range(10):
            tell(store, 10 * second + number, "detector", agent="loop")
        if second % 5 == 0:
            delivery.tend()
        clock.advance(1)
    run(delivery, clock, 20 * MINUTE_S)
    times = [at_us for at_us, _, _ in heard.tried]
    assert all(later - earlier >= 60_000_000 for earlier, later in zip(times, times[10:], strict=False))
    assert len(heard.alerts) == 6_001
    assert max(len(message.alerts) for message in heard.messages) == MAX_ALERTS
    last = heard.messages[-1]
    assert (last.kind, last.alerts[0].facts["was"], last.alerts[0].facts["count"]) == ("resolved", "detector", 6_000)
    assert last.title == "Bursar: team: over: runaway behaviour"
    assert sum(message.kind == "resolved" for message in heard.messages) == 1


def test_the_first_of_a_kind_is_told_at_once_and_the_next_together(store: Store, clock: ManualClock) -> None:
    heard = Heard()
    delivery = told(store, heard)
    for number in range(20):
        tell(store, number, agent=f"a{number}")
        delivery.tend()
        clock.advance(2)
    run(delivery, clock, MINUTE_S)
    assert [len(message.alerts) for message in heard.messages] == [1, 19]
    assert heard.messages[1].title == "Bursar: team: a threshold is crossed (19 times)"
    assert heard.messages[1].text.count("\n") == 10  # ten of them, and how many more


def test_what_ends_by_itself_ends_the_storm(store: Store, clock: ManualClock) -> None:
    heard = Heard()
    delivery = told(store, heard)
    tell(store, 1, "detector")
    delivery.tend()
    tell(store, 2, "resolved", was="detector")
    run(delivery, clock, 30 * MINUTE_S, step_s=60)
    assert [message.kind for message in heard.messages] == ["detector", "resolved"]


@pytest.mark.parametrize("seed", range(8))
def test_nobody_hears_that_it_is_over_before_it_began(seed: int, store: Store, clock: ManualClock) -> None:
    heard = Heard(*[OSError("down")] * 3)
    delivery = told(store, heard, seed=seed)
    tell(store, 1, "frozen")
    tell(store, 2, "resolved", was="frozen")
    run(delivery, clock, MINUTE_S, step_s=1)
    assert [message.kind for message in heard.messages] == ["frozen", "resolved"]


def test_a_message_that_one_sink_never_takes_holds_up_no_other(
    store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """After three days it is given up, and goes to the log."""

    class Picky(Heard):
        def send(self, message: Message, now_us: int) -> None:
            if message.budget == "poison":
                raise Undelivered("picky: not taken")
            super().send(message, now_us)

    heard = Picky()
    delivery = told(store, heard)
    tell(store, 0, budget="poison")
    for number in range(1, 10):
        tell(store, number, budget=f"b{number}")
    run(delivery, clock, 2 * MINUTE_S)
    assert len(heard.alerts) == 9
    assert untold(store) == ["alert-threshold-poison-0"]
    run(delivery, clock, 73 * 3_600, step_s=600)
    assert not untold(store)
    assert "given up" in caplog.text
    assert "Bursar: poison: a threshold is crossed" in caplog.text


def test_more_than_a_process_can_hold_goes_back_to_the_store(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a sink that is down holds up no other either, and nothing is told twice."""
    monkeypatch.setattr(deliverer, "MAX_HELD", 20)
    heard, down = Heard(), Heard(*[OSError("down")] * 1_000)
    delivery = told(store, Route(heard, per_minute=1_000), down)
    for number in range(200):
        tell(store, number, budget=f"b{number % 100}")
        delivery.tend()
        clock.advance(1)
        assert len(delivery._held) <= 20
    run(delivery, clock, 5 * MINUTE_S)
    assert len(heard.alerts) == 200
    down.errors.clear()
    run(delivery, clock, 40 * MINUTE_S)
    assert sorted(down.alerts) == sorted(heard.alerts)
    assert len(set(heard.alerts)) == len(heard.alerts) == 200
    assert not untold(store)


def test_without_sinks_alerts_are_logged(store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    delivery = Deliverer(store, Alerts())
    tell(store, 1, agent="plan\nner", scope='{"team": "red"}', owner="finance@example.com")
    delivery.tend()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("bursar.alerts", logging.WARNING)
    assert record.getMessage() == (
        "Bursar: team: a threshold is crossed\n2025-06-15 15:06:40 UTC  80 %, limit 10.00 USD, spent 8.00 USD, "
        "agent plan ner, scope team=red, owner finance@example.com"
    )


@settings(max_examples=60)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["threshold", "detector", "frozen"]), st.integers(0, 90)),
        max_size=60,
    ),
    faults=st.lists(st.lists(st.booleans(), max_size=40), min_size=2, max_size=2),
    seed=st.integers(0, 2**32),
)
def test_whatever_fails_every_sink_gets_every_alert(
    arrivals: list[tuple[int, str, int]], faults: list[list[bool]], seed: int
) -> None:
    """At least once, in messages that are the same at every attempt, and at most three a minute."""
    clock = ManualClock()
    store = open_store("memory:", clock)
    sinks = [Heard(*(OSError("down") if fails else None for fails in each)) for each in faults]
    delivery = told(store, *(Route(sink, per_minute=3) for sink in sinks), seed=seed)
    for number, (budget, kind, wait_s) in enumerate(arrivals):
        tell(store, number, kind, f"b{budget}")
        delivery.tend()
        clock.advance(wait_s)
    for _ in range(400):
        if not untold(store):
            break
        delivery.tend()
        clock.advance(20)
    assert not untold(store)
    for sink in sinks:
        count = Counter(id for id in sink.alerts if not id.endswith(":over"))
        assert len(count) == len(arrivals)
        assert set(count.values()) <= {1}
        contents: dict[str, set[str]] = {}
        for _, id, body in sink.tried:
            contents.setdefault(id, set()).add(body)
        assert all(len(bodies) == 1 for bodies in contents.values())
        times = [at_us for at_us, _, _ in sink.tried]
        assert all(later - earlier >= 60_000_000 for earlier, later in zip(times, times[3:], strict=False))


def test_an_id_fits_a_header_and_the_signature() -> None:
    """The specification: no full stop, because it separates id, time and body."""
    plain = Message((Alert("a-1", "policy", 0, {}),))
    odd = Message((Alert("budget.über", "policy", 0, {}),))
    both = Message((*plain.alerts, *odd.alerts))
    assert plain.id == "a-1"
    assert all(one.id.isalnum() and one.id.isascii() for one in (odd, both))
    assert len({plain.id, odd.id, both.id}) == 3


def test_names_of_agents_call_nobody_in_a_chat() -> None:
    said = Message((an_alert(1, 0, agent="<!channel> @everyone \x1b[31m"),)).text
    assert "<!" not in said
    assert "@everyone" not in said
    assert "\x1b" not in said


def test_a_budget_s_owner_hears_of_its_thresholds_and_its_questions(clock: ManualClock) -> None:
    """From real calls, and in the words that people read."""
    budget = Budget(
        "team",
        "1 USD",
        per="team",
        owner="ann",
        thresholds=[Threshold("50%", "notify"), Threshold("80%", "ask")],
    )
    heard, other = Heard(), Heard()
    with Bursar("memory:", [budget], clock=clock) as bursar:
        delivery = told(bursar.store, Route(heard, owner="ann"), Route(other, owner="bob"))
        with bursar.scope(team="red", agent="planner"):
            bursar.charge("0.85 USD")
            delivery.tend()
            with pytest.raises(BudgetExceeded):
                bursar.reserve(provider="openai", model="gpt-4o", input_tokens=1_000, max_output_tokens=500)
        run(delivery, clock, 2 * MINUTE_S)
    assert not other.messages
    assert [message.title for message in heard.messages] == [
        "Bursar: team: a threshold is crossed (2 times)",
        "Bursar: team: an approval is asked for",
    ]
    lines = heard.messages[0].text.split("\n")
    assert lines[0].startswith(
        "2025-06-15 15:06:40 UTC  50 %, scope team=red, limit 1.00 USD, spent 0.85 USD, action notify"
    )
    assert lines[1].startswith(
        "2025-06-15 15:06:40 UTC  80 %, scope team=red, limit 1.00 USD, spent 0.85 USD, action ask"
    )
    assert "agent=planner" in lines[0]
    assert "limit 1.00 USD, spent 0.85 USD" in heard.messages[1].text
    assert "owner ann" in heard.messages[1].text
