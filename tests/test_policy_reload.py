"""Hot reload: a policy file that changes takes effect in the running program, whole or not at all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bursar import Budget, BudgetExceeded, Bursar, Operator, OperatorRequired, Stopped, StoreError, Usage
from bursar.commands import Definitions
from bursar.policy_file import PolicyWatch
from bursar.settings import Settings
from bursar.stores.memory import MemoryStore

CENT = Usage(input_tokens=1_000, output_tokens=750)  # of gpt-4o
ONE = '[[budget]]\nname = "a"\nlimit = "0.10 USD"\n'


class Desk:
    """A program under a policy file, without the thread that looks at it: the test looks."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "bursar.toml"
        self.head = f'store = "sqlite:///{folder / "b.db"}?durability=process"\n'
        self.path.write_text(self.head + text)
        self.watch = PolicyWatch(self.path, {})
        self.bursar = Bursar(self.watch.policy.store, **self.watch.options)

    def look(self, times: int = 2, take: Callable[[Settings], None] | None = None) -> None:
        for _ in range(times):
            self.watch.look(self.bursar.store, take or self.bursar._take)

    def write(self, text: str) -> None:
        self.path.write_text(self.head + text)

    def now_reads(self, text: str) -> None:
        self.write(text)
        self.look()

    def spend(self) -> None:
        self.bursar.reserve("openai", "gpt-4o", usage=CENT).settle(CENT)

    def in_force(self) -> dict[str, str]:
        return {one.name: one.limit for one in self.bursar.guard.policy.budgets}

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [alert.facts for alert, _ in self.bursar.store.alerts() if alert.kind == kind]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Desk]]:
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    made: list[Desk] = []

    def make(text: str) -> Desk:
        made.append(Desk(tmp_path, text))
        return made[-1]

    yield make
    for one in made:
        one.bursar.close()


def test_a_changed_file_takes_effect_in_a_running_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that tends calls looks at the file, whether or not calls are made."""
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    path = tmp_path / "bursar.toml"
    path.write_text(f'store = "memory:"\n{ONE}')
    taken = threading.Event()

    class Taken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is in force as it reads now" in record.getMessage():
                taken.set()

    handler, log = Taken(), logging.getLogger("bursar")
    level = log.level
    log.setLevel(logging.INFO)  # not by the attribute: a logger keeps what it found disabled before
    log.addHandler(handler)
    try:
        with Bursar.from_policy(path) as bursar:
            path.write_text('store = "memory:"\n[[budget]]\nname = "a"\nlimit = "0.001 USD"\n')
            assert taken.wait(10)
            with pytest.raises(BudgetExceeded):
                bursar.reserve("openai", "gpt-4o", usage=CENT)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_a_file_that_is_being_written_is_left_alone(desk: Callable[[str], Desk]) -> None:
    """Half a file can be valid, and lack budgets: it is read once it has stood still from one look to the next."""
    here = desk(ONE + ONE.replace('"a"', '"b"'))
    here.write(ONE)
    here.look(1)
    here.write(ONE + ONE.replace('"a"', '"c"'))
    here.look(1)
    assert set(here.in_force()) == {"a", "b"}
    here.look(1)
    assert set(here.in_force()) == {"a", "c"}


def test_every_table_takes_effect(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    sentry = here.bursar.guard.notices.sentry
    here.now_reads(
        'default_limit = "0.02 USD"\nrequire = ["team"]\n[detectors]\nmax_steps = 3\n[tools]\nsearch = "0.015 USD"\n'
    )
    assert here.in_force() == {}
    assert here.bursar.guard.notices.sentry is not sentry
    assert here.bursar.guard.notices.sentry.settings is not None
    assert here.bursar.guard.notices.sentry.settings.max_steps == 3
    with pytest.raises(BudgetExceeded, match="carries no team"):
        here.spend()
    with here.bursar.scope(team="x"):
        with here.bursar.tool("search"):
            pass
        with pytest.raises(BudgetExceeded) as caught, here.bursar.tool("search"):
            pass
        assert (caught.value.budget, str(caught.value.spent)) == ("(default)", "0.015")


def test_what_has_not_changed_goes_on_as_it_was(desk: Callable[[str], Desk]) -> None:
    """Detectors keep what they have seen of runs, and deliveries what they hold, unless their own tables change."""
    here = desk(f"{ONE}[detectors]\nmax_steps = 3\n[[alert]]\nlog = true\n")
    sentry, deliverer = here.bursar.guard.notices.sentry, here.bursar._deliverer
    here.now_reads(f"{ONE}[detectors]\nmax_steps = 3\n[[alert]]\nlog = true\n[tools]\nsearch = '1 USD'\n")
    assert here.bursar.guard.notices.sentry is sentry
    assert here.bursar._deliverer is deliverer is not None
    assert here.bursar.guard.book.tool_price("search") == 10**9


def test_other_sinks_are_told_from_then_on(desk: Callable[[str], Desk]) -> None:
    here = desk(f"{ONE}[[alert]]\nlog = true\n")
    first = here.bursar._deliverer
    here.now_reads(f"{ONE}[[alert]]\nlog = true\nkinds = ['frozen']\n")
    second = here.bursar._deliverer
    assert second is not first
    assert second is not None
    assert here.bursar.guard.notices.told == second.wake
    here.now_reads(ONE)
    assert here.bursar._deliverer is None


def test_calls_in_flight_keep_their_prices(desk: Callable[[str], Desk]) -> None:
    """Reserved, settled and recorded by one price book, though another is in force when the answer comes."""
    here = desk(ONE)
    before = here.bursar.reserve("openai", "gpt-4o", usage=CENT)
    here.now_reads(f'{ONE}[[price]]\nprovider = "openai"\nmodel = "gpt-4o"\ninput_mtok = "1"\noutput_mtok = "1"\n')
    old, new = before.settle(CENT), here.bursar.reserve("openai", "gpt-4o", usage=CENT).settle(CENT)
    assert (old.cost_nanos, new.cost_nanos) == (10_000_000, 1_750_000)
    assert old.price_version != new.price_version == here.bursar.guard.book.version


def test_a_removed_budget_ends_for_this_process(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    for _ in range(10):
        here.spend()
    with pytest.raises(BudgetExceeded):
        here.spend()
    here.now_reads('[[budget]]\nname = "b"\nlimit = "5 USD"\n')
    here.spend()
    with Bursar(here.bursar.store) as other:  # who takes the budgets from the store has both
        assert {one.name for one in other.guard.policy.budgets} == {"a", "b"}
        assert {one.name: str(one.spent) for one in other.status()} == {"a": "0.10", "b": "0.01"}


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ('[[budget]]\nname = "a"\nlimit = "5 dollars"\n', "limit"),
        (f"{ONE}nonsense = 1\n", "nonsense"),
        (f"{ONE}[[alert]]\nwebhook = 'https://x.example'\nsecret_env = 'NO_SUCH_VARIABLE'\n", "NO_SUCH_VARIABLE"),
        ("x = " + "[" * 5_000, ""),
    ],
)
def test_a_faulty_file_changes_nothing_and_is_told_once(
    desk: Callable[[str], Desk], caplog: pytest.LogCaptureFixture, wrong: str, key: str
) -> None:
    here = desk(ONE)
    policy, book = here.bursar.guard.policy, here.bursar.guard.book
    here.write(wrong + "[tools]\nsearch = '1 USD'\n")
    here.look(5)
    assert (here.bursar.guard.policy, here.bursar.guard.book) == (policy, book)
    (said,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert "what was in force stays in force" in said
    (told,) = here.told("policy")
    assert told["file"] == str(here.path)
    assert key in told["why"]
    here.now_reads(ONE.replace("0.10", "0.20"))
    assert here.in_force() == {"a": "0.20 USD"}
    assert [one["was"] for one in here.told("resolved")] == ["policy"]


def test_a_file_that_is_gone_changes_nothing(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    here.path.unlink()
    here.look(3)
    assert here.in_force() == {"a": "0.10 USD"}
    assert "cannot be read" in here.told("policy")[0]["why"]
    here.now_reads(ONE)
    assert len(here.told("resolved")) == 1


def test_a_file_that_is_put_back_as_it_was_is_told_to_be_over(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    aside = here.path.rename(here.path.with_suffix(".aside"))
    here.look()
    aside.rename(here.path)
    here.look(3)
    assert [len(here.told(kind)) for kind in ("policy", "resolved")] == [1, 1]


def test_a_changed_file_that_cannot_be_opened_for_want_of_descriptors_is_taken_later(
    desk: Callable[[str], Desk],
) -> None:
    resource = pytest.importorskip("resource")
    here = desk(ONE)
    here.write(ONE.replace("0.10", "0.20"))
    here.look(1)
    store = MemoryStore()  # which needs none
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        here.watch.look(store, here.bursar._take)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [alert.kind for alert, _ in store.alerts()] == ["policy"]
    here.watch.look(store, here.bursar._take)
    assert here.in_force() == {"a": "0.20 USD"}
    assert [alert.kind for alert, _ in store.alerts()] == ["policy", "resolved"]


def test_a_fault_that_the_store_could_not_be_told_of_is_told_later(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    here.write("nonsense")
    here.look(1)
    away = MemoryStore()
    away.close()  # it still gives its version
    for _ in range(2):
        with pytest.raises(StoreError):
            here.watch.look(away, here.bursar._take)
    here.look(2)
    assert len(here.told("policy")) == 1


def test_another_store_needs_another_start(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    here.path.write_text(f'store = "memory:"\n{ONE.replace("0.10", "5")}')
    here.look()
    assert here.in_force() == {"a": "0.10 USD"}
    assert "Restart" in here.told("policy")[0]["why"]


def test_while_the_store_is_away_the_change_waits(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    here.write(ONE.replace("0.10", "0.20"))

    def unreachable(settings: Settings) -> None:
        raise StoreError("It is away. Try again.", fault="unreachable")

    here.look(1)
    for _ in range(3):
        with pytest.raises(StoreError):
            here.look(1, unreachable)
    here.look(1)
    assert here.in_force() == {"a": "0.20 USD"}
    assert here.told("policy") == []


def test_where_an_operator_signs_the_file_waits_for_his_signature(desk: Callable[[str], Desk]) -> None:
    """An agent that can write its own policy file cannot give itself more by it."""
    here = desk(ONE)
    key = Operator(here.bursar.store, by="ann").appoint()
    richer = ONE.replace("0.10", "500")
    here.now_reads(f"{richer}[tools]\nsearch = '1 USD'\n")
    assert here.in_force() == {"a": "0.10 USD"}
    assert here.bursar.guard.book.tool_price("search") is None
    assert "bursar policy apply" in here.told("policy")[0]["why"]
    with pytest.raises(OperatorRequired):
        Operator(here.bursar.store).publish_budgets([Budget("a", "500 USD")])
    assert Operator(here.bursar.store, key).publish_budgets([Budget("a", "500 USD")]) == ["a"]
    here.look(1)
    assert here.in_force() == {"a": "500 USD"}
    assert here.bursar.guard.book.tool_price("search") == 10**9
    assert len(here.told("policy")) == len(here.told("resolved")) == 1


def test_publishing_is_all_or_nothing(desk: Callable[[str], Desk]) -> None:
    here = desk(ONE)
    Operator(here.bursar.store).appoint()
    with pytest.raises(OperatorRequired):
        Operator(here.bursar.store).publish_budgets([Budget("new", "5 USD"), Budget("a", "500 USD")])
    assert set(here.bursar.store.definitions()[1]["budget"]) == {"a"}


def test_a_reload_reads_only_what_is_newer(desk: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    here = desk(ONE)
    store, read = here.bursar.store, []
    definitions = store.definitions

    def noted(since: int = 0) -> tuple[int, Definitions]:
        version, held = definitions(since)
        read.extend(held.get("freeze", ()))
        return version, held

    for run in ("r-1", "r-2"):
        Operator(store).freeze({"run": run})
        with monkeypatch.context() as here_only:
            here_only.setattr(store, "definitions", noted)
            here.bursar._load_policy()
    assert read == ["run=r-1", "run=r-2"]
    with here.bursar.scope(run="r-1"), pytest.raises(Stopped):
        here.spend()


def test_a_store_that_was_put_back_is_read_anew(tmp_path: Path) -> None:
    memory = MemoryStore()
    with Bursar(memory, [Budget("a", "1 USD")]) as bursar:
        for number in range(3):
            Operator(memory).freeze({"run": f"r-{number}"})
            bursar._load_policy()
        bursar.store = MemoryStore()
        bursar.store.publish({"a": Budget("a", "2 USD").definition()})
        bursar._load_policy()
        assert [budget.limit for budget in bursar.guard.policy.budgets] == ["2 USD"]
        assert bursar.guard.policy.version == 1
        assert not bursar.guard.policy.decisions.any_stopped
