"""What an agent with the store's URL and without the operator's key may try, and what it does not get by it."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bursar import (
    ApprovalRequired,
    Budget,
    BudgetExceeded,
    Bursar,
    Operator,
    OperatorKey,
    OperatorRequired,
    Stopped,
    Threshold,
    Usage,
)
from bursar.cli import main
from bursar.commands import Rejected, Release, Tell
from bursar.detect import Detectors
from bursar.testing import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory:", "sqlite:///FILE?durability=process"])
def bursar(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Bursar]:
    store = request.param.replace("FILE", str(tmp_path / "b.db"))
    budgets = [Budget("b", "0.10 USD", thresholds=[Threshold("50%", "ask")]), Budget("org", "100 USD")]
    with Bursar(store, budgets, clock=clock) as made:
        yield made


def operator(bursar: Bursar) -> Operator:
    return Operator(bursar.store, Operator(bursar.store, by="ann").appoint(), by="ann")


def ask(bursar: Bursar) -> Any:
    return bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)


def question(bursar: Bursar) -> str:
    bursar.charge("0.05 USD")
    with pytest.raises(ApprovalRequired) as caught:
        ask(bursar)
    return str(caught.value.id)


def test_a_switch_cannot_be_turned_to_something_else(bursar: Bursar) -> None:
    """A switch is thrown without the key; under its name stands what it stops, and nothing else."""
    operator(bursar).freeze({"agent": "x"})
    for target in ({"tags": {"agent": "nobody"}}, {"tags": {"agent": "x"}, "account": "[]"}, {"account": "[]"}):
        with pytest.raises(OperatorRequired):
            bursar.store.publish({"agent=x": {"frozen": True, **target}}, "freeze")
    with bursar.scope(agent="x"), pytest.raises(Stopped):
        ask(bursar)


def test_switches_have_names_of_their_own(bursar: Bursar) -> None:
    here = operator(bursar)
    names = {
        here.freeze({"agent": "x", "team": "y"}),
        here.freeze({"agent": "x team=y"}),
        here.freeze({"agent": '"x"'}),
    }
    assert len(names) == 3
    for name in names:
        here.resume(name)
    assert here.frozen() == {}


def test_a_question_cannot_be_turned_to_another_account(bursar: Bursar) -> None:
    """Else an operator who has read a small question would answer a large one."""
    here = operator(bursar)
    id = question(bursar)
    asked = bursar.store.definitions()[1]["approval"][id].definition
    other = next(one.rule.key for one in bursar.store.accounts() if one.rule.budget == "org")
    with pytest.raises(OperatorRequired):
        bursar.store.publish({id: {**asked, "account": other}}, "approval")
    here.approve(id, raise_by="1 USD")
    ask(bursar).release()
    assert {one.name: f"{one.limit:.2f}" for one in bursar.status()} == {"b": "1.10", "org": "100.00"}


def test_a_second_operator_under_another_name_releases_nothing(bursar: Bursar, clock: ManualClock) -> None:
    operator(bursar)
    reservation = ask(bursar)
    clock.advance(601)
    bursar.tend()
    thief = OperatorKey.generate()
    with pytest.raises(OperatorRequired):
        bursar.store.publish({"me": {"public": thief.public}}, "operator")
    answer = bursar.store.execute(Release(reservation.id, proof=thief.prove(reservation.id)))
    assert isinstance(answer, Rejected)
    assert answer.why == "operator"


def test_an_operator_written_past_the_store_under_another_name_counts_for_nothing(
    tmp_path: Path, clock: ManualClock
) -> None:
    file = tmp_path / "b.db"
    thief = OperatorKey.generate()
    with Bursar(f"sqlite:///{file}", [Budget("b", "1 USD")], clock=clock) as bursar:
        operator(bursar)
        reservation = ask(bursar)
        clock.advance(601)
        bursar.tend()
        write(file, "operator", "me", {"public": thief.public})
        answer = bursar.store.execute(Release(reservation.id, proof=thief.prove(reservation.id)))
    assert isinstance(answer, Rejected)


def test_an_approval_of_a_loop_that_is_written_past_the_store_counts_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "b.db"
    with Bursar(
        f"sqlite:///{file}", [Budget("b", "1 USD")], detectors=Detectors(uncapped="off", max_steps=1)
    ) as bursar:
        operator(bursar)
        with bursar.scope(run="r"):
            ask(bursar).release()
            with pytest.raises(ApprovalRequired) as caught:
                ask(bursar)
            asked = bursar.store.definitions()[1]["approval"][caught.value.id].definition
            signature = base64.urlsafe_b64encode(bytes(64)).decode()
            write(file, "approval", caught.value.id, {**asked, "state": "approved", "signature": signature})
            with pytest.raises(BudgetExceeded):
                ask(bursar)


def write(file: Path, kind: str, name: str, definition: dict[str, Any]) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute(
            "INSERT INTO definitions(kind, name, definition, published_us) VALUES (?, ?, ?, 0)",
            (kind, name, json.dumps(definition)),
        )


def test_i7_an_alert_that_somebody_has_told_before_fails_no_settlement(bursar: Bursar) -> None:
    """Ids of reservations can be read in the store, and what their alerts will be called with them."""
    reservation = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=5_000)
    for account in bursar.store.accounts():
        bursar.store.execute(Tell(f"{reservation.id}^{account.rule.key}^0", "threshold", {}))
    record = reservation.settle(Usage(input_tokens=1_000, output_tokens=5_000))
    assert record is not None
    assert bursar.store.open_reservations() == 0
    with pytest.raises(ApprovalRequired):
        ask(bursar)


def test_rubbish_in_the_store_hides_nothing_from_the_operator(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with Bursar(url, [Budget("b", "0.10 USD", thresholds=[Threshold("50%", "ask")])]) as bursar:
        bursar.store.publish({"a": {"state": "open"}, "b": {"state": "open", "account": "[", "why": 1}}, "approval")
        for number, facts in enumerate((["x"], {"tags": "agent"}, {"tags": {"agent": "x"}})):
            bursar.store.execute(Tell(f"t{number}", "frozen", facts))  # type: ignore[arg-type]
        id = question(bursar)
        assert [one.id for one in Operator(bursar.store).questions()] == [id]
    told = CliRunner().invoke(main, ["alerts", "--store", url])
    assert told.exit_code == 0, told.output
    assert told.output.count("cannot be read") == 2
