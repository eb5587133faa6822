"""Changed policies: each change has the outcome that `bursar policy diff` says, and the commands say what holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bursar import ApprovalRequired, BudgetExceeded, Bursar, Operator, Usage
from bursar.cli import main
from bursar.policy_file import PolicyWatch
from bursar.policy_file.changes import NEW_ACCOUNTS

CENT = Usage(input_tokens=1_000, output_tokens=750)  # of gpt-4o
BASE = {"name": "b", "limit": "0.10 USD", "window": "month", "per": "team"}


def bursar(*words: str, status: int = 0) -> Result:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(main, words, catch_exceptions=False, prog_name="bursar")
    assert done.exit_code == status, done.output
    return done


class Desk:
    """A program under a policy file of budgets that has spent five cents of team a."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder / 'b.db'}?durability=process"
        self.old = self.write("old", BASE)
        self.watch = PolicyWatch(self.write("live", BASE), {})
        self.bursar = Bursar(self.watch.policy.store, **self.watch.options)
        self.spend(5)

    def write(self, name: str, *budgets: dict[str, Any], **more: Any) -> Path:
        path = self.folder / f"{name}.yaml"  # JSON is YAML
        path.write_text(json.dumps({"store": self.store, "budget": budgets, **more}))
        return path

    def spend(self, cents: int = 1) -> None:
        with self.bursar.scope(team="a", run="r"):
            for _ in range(cents):
                self.bursar.reserve("openai", "gpt-4o", usage=CENT).settle(CENT)

    def becomes(self, *budgets: dict[str, Any], **more: Any) -> list[dict[str, str]]:
        """Put these budgets into the file that is watched; what the command says of the change."""
        new = self.write("new", *budgets, **more)
        lines = bursar("policy", "diff", str(self.old), str(new), "--format", "json").output.splitlines()
        self.write("live", *budgets, **more)
        for _ in range(2):
            self.watch.look(self.bursar.store, self.bursar._take)
        return [json.loads(line) for line in lines]

    def cents(self) -> dict[str, int]:
        """What was spent, in cents, on each account that a call of team a matches now."""
        with self.bursar.scope(team="a", run="r"):
            reservation = self.bursar.reserve("openai", "gpt-4o", usage=CENT)
        reservation.release()
        held = {account.rule.key: account for account in self.bursar.store.accounts()}
        matched = self.bursar.guard.matched(reservation._call, self.bursar.store.now_us())
        return {one.rule.budget: held[one.rule.key].spent // 10**7 for one in matched}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    made = Desk(tmp_path)
    yield made
    made.bursar.close()


def test_a_limit_below_what_is_spent_refuses_the_next_call_and_nothing_else(desk: Desk) -> None:
    with desk.bursar.scope(team="a", run="r"):
        before = desk.bursar.reserve("openai", "gpt-4o", usage=CENT)
    (said,) = desk.becomes({**BASE, "limit": "0.03 USD"})
    assert (said["budget"], said["key"], said["before"], said["after"]) == ("b", "limit", "0.10 USD", "0.03 USD")
    assert said["outcome"] == "1 of 1 accounts above it: these refuse the next call, and nothing else changes"
    with pytest.raises(BudgetExceeded) as caught:
        desk.spend()
    assert (str(caught.value.limit), str(caught.value.spent)) == ("0.03", "0.05")
    assert before.settle(CENT).cost_nanos == 10_000_000  # what was in flight is booked
    assert desk.becomes(BASE) == []
    assert desk.cents() == {"b": 6}


def test_a_raised_limit_holds_at_once(desk: Desk) -> None:
    desk.spend(5)
    (said,) = desk.becomes({**BASE, "limit": "0.20 USD"})
    assert said["outcome"].startswith("from the next reservation on")
    desk.spend(10)
    with pytest.raises(BudgetExceeded):
        desk.spend()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"window": "week"}, "window"),
        ({"tz": "Asia/Tokyo"}, "tz"),
        ({"per": ["team", "run"]}, "per"),
        ({"limit": "5000 tokens"}, "limit"),
        ({"name": "other"}, "renamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_it_another_budget_counts_from_zero_and_the_old_stays_readable(
    desk: Desk, change: dict[str, Any], key: str
) -> None:
    """In mid-window too. A call in flight is booked where it was reserved."""
    with desk.bursar.scope(team="a", run="r"):
        before = desk.bursar.reserve("openai", "gpt-4o", usage=CENT)
    (said,) = desk.becomes({**BASE, **change})
    assert (said["key"], said["outcome"]) == (key, NEW_ACCOUNTS)
    assert list(desk.cents().values()) == [0]
    before.settle(CENT)
    assert list(desk.cents().values()) == [0]
    old = [one for one in desk.bursar.store.accounts() if one.spent]
    assert [(one.rule.budget, one.spent) for one in old] == [("b", 60_000_000)]
    assert sum(record.cost_nanos for record in desk.bursar.records(team="a")) == 60_000_000
    desk.becomes(BASE)
    assert desk.cents() == {"b": 6}  # and going back goes on where it was


def test_a_budget_that_the_store_knows_goes_on_where_it_was(desk: Desk) -> None:
    desk.becomes()
    desk.old = desk.write("old")
    (said,) = desk.becomes(BASE)
    assert (said["key"], said["outcome"]) == (
        "added",
        "goes on with the 1 accounts that the store has of it, 0.05 USD spent in all",
    )
    assert desk.cents() == {"b": 5}


def test_the_same_threshold_acts_as_the_diff_says(desk: Desk) -> None:
    ladder = [{"at": "40%", "action": "downgrade", "models": {"gpt-4o": "gpt-4o-mini"}}, {"at": "50%", "action": "ask"}]
    (said,) = desk.becomes({**BASE, "thresholds": ladder})
    assert (said["key"], said["before"], said["after"]) == ("thresholds", "(none)", "40% downgrade, 50% ask")
    with desk.bursar.scope(team="a", run="r"):
        first = desk.bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=75)
        assert first.model == "gpt-4o-mini"  # at once
        first.settle(Usage(input_tokens=100, output_tokens=75))
        with pytest.raises(ApprovalRequired):  # from the next settlement on
            desk.bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=75)


def test_a_budget_that_is_switched_off_misses_what_is_spent_meanwhile(desk: Desk) -> None:
    (said,) = desk.becomes({**BASE, "mode": "off"})
    assert said["key"] == "mode"
    desk.spend(9)
    desk.becomes(BASE)
    assert desk.cents() == {"b": 5}


def test_every_table_of_the_file_has_an_outcome(desk: Desk) -> None:
    more = {
        "require": ["team"],
        "default_limit": "1 USD",
        "detectors": "off",
        "tools": {"search": "1 USD"},
        "rates": {"EUR": "1.08"},
        "price": [{"model": "x", "input_mtok": "1"}],
        "ceiling": {"model": "*", "input_mtok": "1", "output_mtok": "2"},
        "alert": [{"log": True}],
    }
    changes = desk.becomes({**BASE, "match": {"team": ["a", "c"]}, "owner": "ann", "on_exceed": "wait 5s"}, **more)
    assert [one["key"] for one in changes if one["budget"]] == ["match", "on_exceed", "owner"]
    assert {one["key"] for one in changes if not one["budget"]} == set(more)
    assert all(one["outcome"] for one in changes)


def test_a_rate_that_changes_is_a_limit_that_changes(desk: Desk) -> None:
    euro = {**BASE, "limit": "0.10 EUR"}
    desk.old = desk.write("old", euro, rates={"EUR": "1.10"})
    limit, rates = desk.becomes(euro, rates={"EUR": "0.40"})
    assert (limit["before"], limit["after"]) == ("0.10 EUR (0.11 USD)", "0.10 EUR (0.04 USD)")
    assert rates["key"] == "rates"
    with pytest.raises(BudgetExceeded):
        desk.spend()


def test_nothing_changes(desk: Desk) -> None:
    assert bursar("policy", "diff", str(desk.old), str(desk.old)).output == "Nothing changes.\n"
    assert (
        "renamed b -> c"
        in bursar("policy", "diff", str(desk.old), str(desk.write("new", {**BASE, "name": "c"}))).output
    )


# -- explain, apply, check -------------------------------------------------------------------------------------------


def explained(file: Path, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bursar("policy", "explain", str(file), *words, "--format", "json").output)
    return found


def test_explain_says_what_a_call_is_held_against_and_how_that_stands(desk: Desk) -> None:
    ladder = [
        {"at": "50%", "action": "notify"},
        {"at": "50%", "action": "clamp", "max_output_tokens": 9},
        {"at": "90%", "action": "ask"},
    ]
    file = desk.write(
        "f",
        {**BASE, "thresholds": ladder, "on_exceed": "wait 20s", "owner": "ann"},
        {"name": "rate", "limit": "60 requests/minute", "per": "model"},
        {"name": "others", "limit": "1 USD", "match": {"team": ["x*", "y"]}},
        {"name": "searches", "limit": "5 calls"},
        {"name": "asleep", "limit": "1 USD", "mode": "off"},
    )
    found = explained(file, "--provider", "openai", "--model", "gpt-4o", "--agent", "planner", "team=a", "run=r")
    assert found["call"] == {"provider": "openai", "model": "gpt-4o", "agent": "planner", "team": "a", "run": "r"}
    account, rate = sorted(found["accounts"], key=lambda one: str(one["budget"]))
    assert (account["budget"], account["scope"], account["limit"], account["spent"]) == (
        "b",
        {"team": "a"},
        "0.10",
        "0.05",
    )
    assert account["until"] is not None
    assert [(step["from"], step["action"], step["holds"]) for step in account["ladder"]] == [
        ("0.05", "notify", True),
        ("0.05", "clamp", True),
        ("0.09", "ask", False),
    ]
    assert account["when_short"] == "waits up to 20 s, then refuses"
    assert (rate["budget"], rate["scope"], rate["window"]) == ("rate", {"model": "gpt-4o"}, "refilled continuously")
    assert {one["budget"]: one["why"] for one in found["unmatched"]} == {
        "others": "it is for team x* or y, not a",
        "searches": "such a call uses no calls",
        "asleep": 'mode = "off"',
    }
    assert found["notes"] == ["It is priced as openai/gpt-4o, source: genai-prices."]
    shown = bursar(
        "policy", "explain", str(file), "--provider", "openai", "--model", "gpt-4o", "team=a", "run=r"
    ).output
    assert "balances of the store" in shown
    assert "clamp 9 tokens" in shown
    tool = explained(file, "--tool", "search", "team=a")
    assert {one["budget"] for one in tool["accounts"]} == {"b", "searches"}
    Operator(desk.store).freeze({"team": "a"})
    assert explained(file, "team=a")["notes"][0].startswith("It is stopped now by the switch 'team=a' (frozen)")


@pytest.mark.parametrize(
    ("more", "words", "note"),
    [
        ({}, ["--provider", "openai", "--model", "gpt-44o"], "It is refused: "),
        ({"require": ["team"]}, [], "It is refused for want of team: the policy requires team."),
        ({}, [], "No budget limits what it may spend (action: notify)."),
        ({"detectors": {"uncapped": "block"}}, [], "No budget limits what it may spend (action: block)."),
        ({"detectors": "off"}, [], "No budget limits what it may spend (nothing watches for that)."),
        ({"default_limit": "1 USD"}, [], "No budget limits it: the default_limit of 1 USD a run does."),
    ],
)
def test_explain_says_what_else_becomes_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: list[str], note: str
) -> None:
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps({"store": f"sqlite:///{tmp_path / 'none.db'}", **more}))
    found = explained(file, *words)
    assert any(line.startswith(note) for line in found["notes"]), found
    assert [one["budget"] for one in found["accounts"]] == (["(default)"] if "default_limit" in more else [])
    assert not (tmp_path / "none.db").exists()


def test_apply_puts_the_budgets_in_force_for_every_process(desk: Desk, tmp_path: Path) -> None:
    file = desk.write("new", {**BASE, "limit": "0.05 EUR"}, {"name": "c", "limit": "5 USD"}, rates={"EUR": "1.00"})
    assert bursar("policy", "apply", str(file)).output.startswith("In force in sqlite:///")
    with pytest.raises(BudgetExceeded):
        desk.spend()
    again = json.loads(bursar("policy", "apply", str(file), "--format", "json").output)
    assert again == {"store": desk.store, "published": [], "only_in_store": []}
    bursar("operator", "init", "--store", desk.store, "--out", str(tmp_path / "key"))
    richer = desk.write("new", {**BASE, "limit": "500 USD"})
    refused = bursar("policy", "apply", str(richer), status=1).output
    assert "bursar policy apply FILE" in refused
    done = bursar("policy", "apply", str(richer), "--key", str(tmp_path / "key")).output
    assert done.splitlines()[1] == "The store has further budgets, which stay as they are: c."
    desk.spend()


def test_check_warns_of_what_is_valid_and_cannot_be_meant(desk: Desk, tmp_path: Path) -> None:
    file = desk.write("new", {**BASE, "thresholds": [{"at": "50%", "action": "ask"}]}, {**BASE, "name": "b2"})
    found = json.loads(bursar("policy", "check", str(file), "--format", "json").output)
    assert (found["budgets"], [line.split(":")[0] for line in found["warnings"]]) == (
        2,
        [
            "The budget 'b' asks, but its store has no operator who could approve. Run `bursar operator init`.",
            "The budget 'b2' can never refuse a call",
        ],
    )
    bursar("operator", "init", "--store", desk.store, "--out", str(tmp_path / "key"))
    shown = bursar("policy", "check", str(file)).output.splitlines()
    assert [line[:20] for line in shown[1:]] == ["warning: The budget "]


def test_a_store_that_is_named_has_to_exist(desk: Desk, tmp_path: Path) -> None:
    gone = f"sqlite:///{tmp_path / 'none.db'}"
    for words in (["check", str(desk.old)], ["explain", str(desk.old)], ["diff", str(desk.old), str(desk.old)]):
        assert "There is no store" in bursar("policy", *words, "--store", gone, status=2).output
