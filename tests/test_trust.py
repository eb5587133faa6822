"""Trust: a pinned operator, budgets that nobody changes unsigned, an audit of every decision, and the seal."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bursar import (
    Budget,
    BudgetExceeded,
    Bursar,
    InvalidInput,
    Operator,
    OperatorKey,
    OperatorRequired,
    PolicyError,
    StoreError,
    Usage,
)
from bursar.audit import audit
from bursar.cli import main
from bursar.commands import Definition, Settle
from bursar.decisions import Decisions
from bursar.policy_file import PolicyWatch
from bursar.seal import is_broken, seal
from bursar.signing import PREFIX, _signed
from bursar.testing import ManualClock

OWN, THIEF = (OperatorKey(PREFIX + base64.urlsafe_b64encode(bytes([seed] * 32)).decode()) for seed in (1, 2))
SMALL, LARGE = Budget("b", "0.01 USD"), Budget("b", "100 USD")


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BURSAR_OPERATOR", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "b.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def open_books(file: Path, clock: ManualClock) -> Iterator[Callable[..., Bursar]]:
    opened: list[Bursar] = []

    def make(*budgets: Budget, **more: Any) -> Bursar:
        url = f"sqlite:///{file}?durability=process"
        opened.append(Bursar(url, list(budgets) or None, detectors="off", clock=clock, **more))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def write(file: Path, statement: str, *values: object) -> None:
    """What an agent does that may write to the file: past Bursar."""
    with sqlite3.connect(file) as connection:
        assert connection.execute(statement, values).rowcount > 0


def decide(file: Path, kind: str, name: str, definition: object) -> None:
    statement = "INSERT INTO definitions(kind, name, definition, published_us) VALUES (?, ?, ?, 0)"
    write(file, statement, kind, name, json.dumps(definition))


def spend(bursar: Bursar) -> None:
    bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=5_000).release()


def command(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, words, prog_name="bursar")


# -- the pin


def test_a_pinned_operator_is_appointed_where_there_is_none(open_books: Callable[..., Bursar]) -> None:
    """So that nobody comes before: `operator init` is for the first store alone."""
    bursar = open_books(SMALL, operator=OWN.public)
    with pytest.raises(OperatorRequired):
        Operator(bursar.store).appoint()
    Operator(bursar.store, OWN).raise_limit("b", "1 USD") if list(bursar.store.accounts()) else bursar.charge(
        "0.001 USD"
    )
    Operator(bursar.store, OWN).raise_limit("b", "1 USD")
    spend(bursar)
    assert audit(bursar.store, operator=OWN.public) == []


def test_a_store_whose_operator_is_another_is_refused(open_books: Callable[..., Bursar]) -> None:
    """Somebody ran `operator init` first."""
    Operator(open_books(SMALL).store, by="agent").appoint()
    with pytest.raises(OperatorRequired, match=OWN.public):
        open_books(SMALL, operator=OWN.public)


def test_an_operator_who_is_exchanged_under_a_running_process_stops_it(
    open_books: Callable[..., Bursar], file: Path
) -> None:
    bursar = open_books(SMALL, operator=OWN.public)
    bursar.charge("0.001 USD")
    key = next(bursar.store.accounts()).rule.key
    decide(file, "operator", "operator", {"public": THIEF.public})
    decide(file, "raise", "mine", THIEF.sign("raise", "mine", {"account": key, "raise_by": 10**12, "until_us": None}))
    for _ in range(2):
        with pytest.raises(OperatorRequired):
            spend(bursar)
    assert {one.what for one in audit(bursar.store, operator=OWN.public)} == {"signature", "operator"}


def test_the_environment_and_the_policy_file_pin_too(
    open_books: Callable[..., Bursar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(f'store = "sqlite:///{tmp_path / "own.db"}"\noperator = "{OWN.public}"\n')
    with Bursar.from_policy(policy) as bursar:
        assert bursar.store.definitions()[1]["operator"]["operator"].definition["public"] == OWN.public
    monkeypatch.setenv("BURSAR_OPERATOR", THIEF.public)  # it overrides the file, as BURSAR_STORE does
    with pytest.raises(OperatorRequired):
        Bursar.from_policy(policy)
    with pytest.raises(OperatorRequired):
        open_books(operator=OWN.public).store.publish({"operator": {"public": OWN.public}}, "operator")


def test_the_pin_of_a_policy_file_does_not_change_under_a_running_program(tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(f'store = "memory:"\noperator = "{OWN.public}"\n')
    watch = PolicyWatch(policy, {})
    policy.write_text(f'store = "memory:"\noperator = "{THIEF.public}"\n')
    with pytest.raises(PolicyError, match="operator cannot change"):
        watch._try(lambda settings: pytest.fail("it was taken"))


@pytest.mark.parametrize("text", ["", "x", OWN.text, OWN.public[:-4], OWN.public + "AAAA", 5])
def test_what_is_no_public_key_pins_nothing(text: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        Bursar("memory:", operator=text)
    (tmp_path / "p.yaml").write_text(json.dumps({"operator": text}))
    told = command("policy", "check", str(tmp_path / "p.yaml"))
    assert told.exit_code == 1
    assert OWN.text not in told.output


def test_init_says_how_to_pin(tmp_path: Path, file: Path, open_books: Callable[..., Bursar]) -> None:
    open_books(SMALL)
    told = command("operator", "init", "--store", f"sqlite:///{file}", "--out", str(tmp_path / "key"))
    assert f"BURSAR_OPERATOR={OperatorKey((tmp_path / 'key').read_text()).public}" in told.output
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


# -- budgets


def test_a_limit_that_was_raised_past_the_store_is_not_taken(open_books: Callable[..., Bursar], file: Path) -> None:
    bursar = open_books(SMALL)
    Operator(bursar.store).appoint()
    decide(file, "budget", "b", LARGE.definition())
    for _ in range(2):
        with pytest.raises(BudgetExceeded) as caught:
            spend(bursar)
        assert str(caught.value.limit) == "0.01"
    assert {one.what for one in audit(bursar.store)} == {"signature"}


@pytest.mark.parametrize(
    "statement", ["UPDATE definitions SET definition = ?", "UPDATE definitions SET definition = ?, version = 9"]
)
def test_a_limit_that_was_raised_in_its_place_is_not_taken(
    open_books: Callable[..., Bursar], file: Path, statement: str
) -> None:
    bursar = open_books(SMALL)
    Operator(bursar.store).appoint()
    write(file, f"{statement} WHERE kind = 'budget'", json.dumps(LARGE.definition()))
    decide(file, "budget", "other", Budget("other", "1 USD").definition())  # so that it is read again
    with pytest.raises(BudgetExceeded):
        spend(bursar)


def test_a_budget_that_was_taken_away_holds_on(open_books: Callable[..., Bursar], file: Path) -> None:
    bursar = open_books(SMALL)
    Operator(bursar.store).appoint()
    write(file, "DELETE FROM definitions WHERE kind = 'budget'")
    decide(file, "budget", "other", Budget("other", "1 USD").definition())
    with pytest.raises(BudgetExceeded):
        spend(bursar)
    assert "definition" in {one.what for one in audit(bursar.store)}


def test_a_change_that_the_operator_signed_is_taken_and_an_old_one_is_not_taken_again(
    open_books: Callable[..., Bursar], file: Path
) -> None:
    bursar = open_books(SMALL)
    operator = Operator(bursar.store, Operator(bursar.store).appoint())
    operator.publish_budgets([LARGE])
    spend(bursar)
    signed = bursar.store.definitions()[1]["budget"]["b"].definition
    operator.publish_budgets([SMALL])
    with pytest.raises(BudgetExceeded):
        spend(bursar)
    assert audit(bursar.store) == []
    decide(file, "budget", "b", signed)  # the operator's own words, said again by somebody else
    with pytest.raises(BudgetExceeded):
        spend(bursar)
    assert {one.what for one in audit(bursar.store)} == {"signature"}


def test_old_decisions_are_not_verified_with_every_change() -> None:
    """There may be thousands, and each process takes every change: a signature is looked at when its account is asked for."""
    key = OperatorKey.generate()
    raises = {
        f"raise {number}": Definition(
            2 + number, key.sign("raise", f"raise {number}", {"account": f"a{number}", "raise_by": 5})
        )
        for number in range(9)
    }
    forged = Definition(99, {"account": "a1", "raise_by": 70, "signature": ""})
    held = {"operator": {"operator": Definition(1, {"public": key.public})}, "raise": {**raises, "forged": forged}}
    before = _signed.cache_info().misses
    decisions = Decisions(held)
    assert _signed.cache_info().misses == before
    assert [decisions.granted(account, 0) for account in ("a0", "a1", "nobody")] == [(5, False), (5, False), (0, False)]
    assert _signed.cache_info().misses == before + 3


@pytest.mark.parametrize("kind", ["raise", "approval"])
@pytest.mark.parametrize("rubbish", [{}, {"account": ["a"]}, {"account": 1}, {"account": "a", "until_us": "soon"}])
def test_a_decision_of_rubbish_stops_nobody(
    open_books: Callable[..., Bursar], file: Path, clock: ManualClock, kind: str, rubbish: dict[str, Any]
) -> None:
    bursar = open_books(LARGE)
    decide(file, kind, "rubbish", {"state": "approved", **rubbish})
    spend(bursar)
    spend(open_books())
    clock.advance(3 * 86_400)
    assert Operator(bursar.store).prune(clock.now_us() - 86_400_000_000)[0].records == 2


def test_a_key_that_nests_too_deep_is_rubbish_too(open_books: Callable[..., Bursar], file: Path) -> None:
    bursar = open_books(LARGE)
    decide(file, "freeze", "rubbish", {"frozen": True, "account": "[" * 100_000})
    decide(file, "approval", "rubbish", {"state": "open", "account": "[" * 100_000, "tags": {}})
    spend(bursar)
    assert Operator(bursar.store).questions() == []
    assert list(Operator(bursar.store).frozen()) == ["rubbish"]


def test_what_a_former_operator_granted_counts_no_more(open_books: Callable[..., Bursar]) -> None:
    bursar = open_books(SMALL)
    operator = Operator(bursar.store, Operator(bursar.store, by="ann").appoint(), by="ann")
    bursar.charge("0.01 USD")
    operator.raise_limit("b", "1 USD")
    spend(bursar)
    successor = Operator(bursar.store, operator.appoint(), by="bob")
    with pytest.raises(BudgetExceeded):
        spend(bursar)
    successor.raise_limit("b", "1 USD")
    spend(bursar)
    assert audit(bursar.store) == []


def test_without_an_operator_budgets_change_freely(open_books: Callable[..., Bursar]) -> None:
    bursar = open_books(SMALL)
    open_books(LARGE)
    spend(bursar)
    assert audit(bursar.store) == []


def test_a_store_that_lost_a_budget_is_damaged(open_books: Callable[..., Bursar], file: Path) -> None:
    open_books(SMALL)
    from bursar.trust import Trust

    with pytest.raises(StoreError, match="lost"):
        Trust(None).budgets({}, ["b"])


# -- the audit


@pytest.mark.parametrize(
    ("kind", "name", "definition"),
    [
        ("operator", "operator", {"public": THIEF.public}),
        ("raise", "mine", {"account": "x", "raise_by": 9}),
        ("approval", "ask-1", {"state": "approved", "account": "x"}),
        ("freeze", "agent=x", {"frozen": False, "tags": {"agent": "x"}}),
        ("freeze", "agent=y", {"frozen": True, "tags": {"agent": "nobody"}}),
        ("budget", "b", LARGE.definition()),
        ("budget", "b", ["rubbish"]),
        ("freeze", "x", {"frozen": True, "tags": "rubbish"}),
    ],
)
def test_the_audit_finds_what_only_an_operator_may_decide(
    open_books: Callable[..., Bursar], file: Path, kind: str, name: str, definition: object
) -> None:
    bursar = open_books(SMALL)
    operator = Operator(bursar.store, Operator(bursar.store).appoint())
    operator.freeze({"agent": "x"})
    assert audit(bursar.store) == []
    decide(file, kind, name, definition)
    found = audit(bursar.store)
    assert [(one.what in ("signature", "definition"), one.key) for one in found] == [(True, f"{kind} {name}")]


def test_the_audit_finds_decisions_that_are_gone(open_books: Callable[..., Bursar], file: Path) -> None:
    bursar = open_books(SMALL)
    operator = Operator(bursar.store, Operator(bursar.store).appoint())
    operator.freeze({"agent": "x"})
    operator.freeze({"agent": "y"})
    write(file, "DELETE FROM definitions WHERE name = 'agent=x'")
    assert [one.what for one in audit(bursar.store)] == ["definition"]


def expired(bursar: Bursar, clock: ManualClock) -> str:
    reservation = bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    clock.advance(601)
    bursar.tend()
    return reservation.id


def test_a_release_that_the_operator_signed_is_in_order(open_books: Callable[..., Bursar], clock: ManualClock) -> None:
    bursar = open_books(LARGE)
    first = Operator(bursar.store, Operator(bursar.store).appoint())
    first.release(expired(bursar, clock))
    second = Operator(bursar.store, first.appoint())  # who was operator then stays so for what was decided then
    second.release(expired(bursar, clock))
    assert audit(bursar.store) == []


def test_the_audit_finds_a_release_that_was_written_past_the_store(
    open_books: Callable[..., Bursar], clock: ManualClock, file: Path
) -> None:
    """Records and balances agree: all that is missing is the operator's proof."""
    bursar = open_books(LARGE)
    operator = Operator(bursar.store, Operator(bursar.store).appoint())
    id = expired(bursar, clock)
    operator.release(id)
    for proof in ("", THIEF.prove(id), "\u00e9"):
        write(file, "UPDATE records SET facts = ? WHERE kind = 'reversal'", json.dumps({"by": "ann", "proof": proof}))
        assert [(one.what, one.key) for one in audit(bursar.store)] == [("signature", f"reversal {id}~")]


@pytest.mark.parametrize("column", ["cost_nanos = -5", "amounts = json_set(amounts, '$.x', -5)"])
def test_the_audit_finds_a_record_below_nothing(open_books: Callable[..., Bursar], file: Path, column: str) -> None:
    bursar = open_books(LARGE)
    bursar.charge("0.10 USD")
    write(file, f"UPDATE records SET {column}")
    assert "record" in {one.what for one in audit(bursar.store)}


def test_a_settlement_of_somebody_elses_call_at_0_is_in_order_and_the_record_says_so(
    open_books: Callable[..., Bursar],
) -> None:
    """The limit: whoever may write to the store may end any reservation. Only the provider's invoice tells."""
    bursar, agent = open_books(LARGE), open_books()
    call = bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    agent.store.execute(Settle(call.id, {"USD": 0}, 0, {}, "completed"))
    with pytest.raises(Exception, match=call.id):  # whoever made the call is told
        call.settle(Usage(input_tokens=10, output_tokens=10))
    assert audit(bursar.store) == []
    assert [(one.cost_nanos, one.outcome) for one in bursar.records()] == [(0, "completed")]


# -- the seal


def test_a_seal_holds_while_the_books_grow(open_books: Callable[..., Bursar], clock: ManualClock) -> None:
    bursar = open_books(LARGE)
    bursar.charge("0.10 USD", id="z")  # ids of callers' own do not rise with time
    clock.advance(61)
    given = seal(bursar.store)
    bursar.charge("0.20 USD", id="a")
    Operator(bursar.store).freeze({"agent": "x"})
    clock.advance(1_000)
    assert not is_broken(bursar.store, given)
    assert given != seal(bursar.store)


@pytest.mark.parametrize(
    "statement",
    [
        # rewritten together, so that the balances are what the records say
        "UPDATE records SET cost_nanos = 1, amounts = json_replace(amounts, '$.' || json_quote((SELECT key FROM accounts)), 1)",
        "UPDATE records SET draft = json_set(draft, '$.tags.agent', 'somebody else')",
        "DELETE FROM records",
        "INSERT INTO records SELECT id || 'x', kind, corrects, outcome, estimated, reason, 0, usage, '{}', reserved_us, "
        "settled_us, digest, draft, facts, org, team, project, user, customer, workflow, agent, run, tool, connection, "
        "provider, model, model_answered FROM records",
        "UPDATE definitions SET definition = json_set(definition, '$.limit', '100 USD')",
        "DELETE FROM definitions",
    ],
)
def test_a_seal_breaks_when_what_it_covers_is_rewritten(
    open_books: Callable[..., Bursar], clock: ManualClock, file: Path, statement: str
) -> None:
    bursar = open_books(SMALL)
    bursar.charge("0.10 USD")
    clock.advance(61)
    given = seal(bursar.store)
    write(file, statement)
    assert is_broken(bursar.store, given)


def test_the_command_seals_and_tells(file: Path) -> None:
    url = f"sqlite:///{file}"
    clock = ManualClock()
    with Bursar(url, [LARGE], clock=clock) as bursar:
        bursar.charge("0.10 USD")
    told = command("audit", "--seal", "--store", url)
    assert told.exit_code == 0
    given = told.output.splitlines()[-1]
    assert command("audit", "--against", given, "--store", url).exit_code == 0
    write(file, "UPDATE records SET draft = json_set(draft, '$.tags.agent', 'somebody else')")
    told = command("audit", "--against", given, "--store", url)
    assert told.exit_code == 1
    assert "seal" in told.output
    assert command("audit", "--against", "no seal", "--store", url).exit_code == 1
