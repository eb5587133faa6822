"""Budgets and policies: what they match, in what version they hold, and what is said of those that are wrong."""

from __future__ import annotations

import contextlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bursar import Budget, BudgetExceeded, Bursar, PolicyError, StoreError
from bursar.budget import parse_limit
from bursar.money import MAX_NANOS
from bursar.policy import Matched, Policy
from bursar.scope import Scope

MODEL_UNITS = ("USD", "tokens", "requests", "slots")


def matched(policy: Policy, *path: dict[str, str], **own: str) -> tuple[Matched, ...]:
    scope: Scope | None = None
    for tags in path or ({},):
        scope = Scope(tags, scope)
    assert scope is not None
    return policy.match(scope, MODEL_UNITS, 1_750_000_000_000_000, **own)


def scopes(found: tuple[Matched, ...]) -> list[dict[str, str]]:
    return [json.loads(one.rule.scope) for one in found]


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit", "period_s"),
    [
        ("5 USD", 5_000_000_000, "USD", 0),
        ("0.000000001 USD", 1, "USD", 0),
        ("1,500.50 USD", 1_500_500_000_000, "USD", 0),
        ("4.50 EUR", 4_860_000_000, "USD", 0),
        ("200_000 tokens", 200_000, "tokens", 0),
        (" 60requests / minute ", 60, "requests", 60),
        ("2 USD/hour", 2_000_000_000, "USD", 3_600),
        ("8 slots", 8, "slots", 0),
        ("4611686018 USD", 4_611_686_018 * 10**9, "USD", 0),
    ],
)
def test_limits_are_exact(text: str, amount: int, unit: str, period_s: int) -> None:
    limit = parse_limit(Budget("b", text), {"EUR": "1.08"})
    assert (limit.amount, limit.unit, limit.period_us) == (amount, unit, period_s * 1_000_000)
    assert limit.amount <= MAX_NANOS


WRONG_BUDGETS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "a" * 101}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": 7}, "name"),
    *[
        ({"limit": limit}, "limit")
        for limit in (
            "", "5", "USD", "5 usd", "-5 USD", "0 USD", "0.0000000001 USD", "1,50 USD", "1_0 USD", "5 USD/week", "1e9 USD",
            "5 apples", "1.5 requests", "3 slots/minute", "9999999999 USD", "9" * 500 + " USD", "٣ USD", 5, None, 0.5, ["5 USD"],
        )
    ],
    *[({"window": window}, "window") for window in ("", "daily", "rolling 0m", "rolling 5y", None, 3)],
    ({"limit": "5 requests/minute", "window": "day"}, "window"),
    ({"limit": "5 slots", "window": "day"}, "window"),
    *[({"tz": tz}, "tz") for tz in ("Mars", "", "../../etc/passwd", None)],
    *[({"per": per}, "per") for per in (5, ["run", "run"], ["run", 3], [""], {"run"}, None)],
    *[({"match": match}, "match") for match in ("team", {"team": 5}, {"team": []}, {3: "x"}, {"": "x"}, ["team"])],
    *[({"estimate": estimate}, "estimate") for estimate in ("exact", None, [])],
    *[({"on_exceed": text}, "on_exceed") for text in ("deny", "wait 5", "wait -5s", "wait 5h", "", None, 5)],
    ({"on_unreachable": "maybe"}, "on_unreachable"),
    ({"mode": "dry-run"}, "mode"),
    ({"owner": "a\0b"}, "owner"),
    ({"owner": 5}, "owner"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "key"), WRONG_BUDGETS, ids=str)
def test_a_wrong_budget_names_the_budget_the_key_and_the_way_out(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Budget(**{"name": "b", "limit": "5 USD"} | wrong)
    assert caught.value.key == key
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 1_000


def test_a_budget_is_its_definition() -> None:
    budget = Budget(
        "b", "5 USD", "day", "Europe/Berlin", ["run"], {"team": ["a", "b*"]}, on_exceed="wait 3s", owner="me"
    )
    assert Budget(**json.loads(json.dumps(budget.definition()))).definition() == budget.definition()
    assert hash(budget) == hash(Budget(**budget.definition()))


def test_two_budgets_of_one_name_are_refused() -> None:
    with pytest.raises(PolicyError, match="Two budgets are named 'b'"):
        Policy([Budget("b", "5 USD"), Budget("b", "6 USD")])


@pytest.mark.parametrize("rate", ["", "abc", "-1", "0", "NaN", "1e5", 1.08, None])
def test_a_wrong_rate_is_named(rate: Any) -> None:
    with pytest.raises(PolicyError, match=r"rates\['EUR'\]"):
        Policy([Budget("b", "5 EUR")], rates={"EUR": rate})
    with pytest.raises(PolicyError, match="Give Bursar the rate: rates="):
        Policy([Budget("b", "5 EUR")])


# -- matching --------------------------------------------------------------------------------------------------------


def test_per_makes_an_account_for_each_value_and_none_for_the_missing() -> None:
    policy = Policy([Budget("b", "5 USD", per=["team", "user"])])
    assert scopes(matched(policy, {"team": "a", "user": "u"})) == [{"team": "a", "user": "u"}]
    assert scopes(matched(policy, {"team": "a"})) == [{"team": "a", "user": "(none)"}]


@pytest.mark.parametrize(
    ("match", "tags", "hits"),
    [
        ({"team": "a"}, {"team": "a"}, True),
        ({"team": "a"}, {"team": "b"}, False),
        ({"team": "a"}, {}, False),
        ({"team": ["a", "c*"]}, {"team": "cde"}, True),
        ({"team": "a", "user": "*"}, {"team": "a"}, True),  # (none) is a value
        ({"team": "A"}, {"team": "a"}, False),
        ({"model": "gpt-*"}, {}, True),
        ({"provider": "anthropic"}, {}, False),
    ],
)
def test_match_selects_by_tags(match: dict[str, Any], tags: dict[str, str], hits: bool) -> None:
    found = matched(Policy([Budget("b", "5 USD", match=match)]), tags, provider="openai", model="gpt-4o")
    assert bool(found) is hits


def test_ancestors_accounts_hold_for_inner_scopes() -> None:
    policy = Policy([Budget("b", "5 USD", per="run")])
    found = matched(policy, {"run": "outer", "team": "a"}, {"run": "inner"}, {"agent": "x"})
    assert scopes(found) == [{"run": "inner"}, {"run": "outer"}]


def test_what_was_matched_before_is_what_would_be_matched_now() -> None:
    """A call takes what is known of an earlier one only where no budget tells them apart."""
    budgets = [
        Budget("team", "5 USD", per="team", match={"team": ["a", "b"]}),
        Budget("run", "5 USD", per=["run", "user"], match={"team": "a"}),
        Budget("model", "5 USD", per="model", match={"org": "b"}),
    ]
    default = Budget("default", "5 USD", per="agent")
    values = [
        {},
        *({"team": one} for one in "ab"),
        {"user": "b"},
        {"org": "b"},
        {"run": "a"},
        {"agent": "a"},
        {"team": "(none)"},
    ]
    paths = [path for depth in (1, 2, 3) for path in product(values, repeat=depth)]
    policy = Policy(budgets, default=default)
    for path in paths:
        for model in ("gpt-4o", "gpt-4"):
            fresh = Policy(budgets, default=default)
            assert matched(policy, *path, model=model) == matched(fresh, *path, model=model), path


def test_what_was_matched_before_holds_until_a_window_begins() -> None:
    budgets = [Budget("day", "5 USD", window="day"), Budget("run", "5 USD", window="hour", per="run")]
    policy = Policy(budgets)
    for hours, run in product((0, 1, 0, 24, 25, 24, 0), "aab"):
        asked = Scope({"run": run}), MODEL_UNITS, (480_000 + hours) * 3_600_000_000
        assert policy.match(*asked) == Policy(budgets).match(*asked), (hours, run)


@pytest.mark.parametrize("value", ['"', "\\", "ü", "😀", "a b/c", "{}, 0]"])
def test_an_accounts_key_is_written_as_json_dumps_does(value: str) -> None:
    """Stores hold accounts under it, whatever version made them."""
    budget = Budget(f"b {value}", "5 USD", window="day", per=("run", "team"))
    (one,) = matched(Policy([budget]), {"run": value})
    scope = {"run": value, "team": "(none)"}
    key = [budget.name, "USD", "day UTC", scope, one.rule.start_us]
    assert one.rule.key == json.dumps(key, ensure_ascii=False)
    assert one.rule.scope == json.dumps(scope, ensure_ascii=False)


def test_calls_that_no_budget_tells_apart_are_matched_once() -> None:
    policy = Policy([Budget("b", "5 USD", per="team")])
    for run in range(100):
        matched(policy, {"team": "a", "run": f"r-{run}"})
    assert len(policy._cache) == 1


@pytest.mark.parametrize(
    "value", ["r[1]", "*", "?", "[a-z]", "r*", "]", "[!a]", "'; DROP TABLE records; --", '"', "a b", "ü", "(none)"]
)
def test_a_scopes_own_budget_takes_its_tags_by_value(value: str) -> None:
    """A run named like a pattern neither escapes its budget nor catches others."""
    with Bursar("memory:") as bursar:
        with bursar.scope(run=value, budget="0.01 USD"):
            with pytest.raises(BudgetExceeded) as caught:
                bursar.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=1)
            assert caught.value.scope == {"run": value}
            with bursar.scope(run="other"), pytest.raises(BudgetExceeded):
                bursar.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=1)
        with bursar.scope(run="other"):
            bursar.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=1).release()


def test_a_scopes_budget_without_tags_is_that_blocks_alone() -> None:
    with Bursar("memory:") as bursar:
        for _ in range(3):
            with bursar.scope(budget="0.3 USD"):
                bursar.reserve("openai", "gpt-4o", input_tokens=80_000, max_output_tokens=1).settle_unknown("a test")
                with pytest.raises(BudgetExceeded):
                    bursar.reserve("openai", "gpt-4o", input_tokens=80_000, max_output_tokens=1)
        with pytest.raises(PolicyError, match="limit"), bursar.scope(run="r", budget="one dollar"):
            raise AssertionError("it must not be entered")


def test_child_budgets_hold_on_parent_and_child() -> None:
    """Five children of 0.41 each under a parent of 1: the parent's limit is the one that counts."""
    granted = 0
    with Bursar("memory:", [Budget("run", "1 USD", per="run")]) as bursar, bursar.scope(run="parent"):
        for child in range(5):
            with bursar.scope(run=f"child-{child}", budget="0.41 USD"):
                for _ in range(3):  # of 0.2 each
                    with contextlib.suppress(BudgetExceeded):
                        bursar.reserve("openai", "gpt-4o", input_tokens=80_000, max_output_tokens=1, resize=False)
                        granted += 1
    assert granted == 4


# -- modes and versions ----------------------------------------------------------------------------------------------


def test_shadow_counts_and_off_does_not() -> None:
    budgets = [Budget("shadow", "0.01 USD", mode="shadow"), Budget("off", "0.01 USD", mode="off")]
    with Bursar("memory:", budgets) as bursar:
        for _ in range(2):
            bursar.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=1).settle_unknown("a test")
        statuses = {status.name: status for status in bursar.status()}
        assert set(statuses) == {"shadow"}
        assert statuses["shadow"].spent > statuses["shadow"].limit


@pytest.mark.parametrize("url", ["memory:", "sqlite:///FILE"])
def test_the_newest_limit_holds_for_every_process(url: str, tmp_path: Path) -> None:
    url = url.replace("FILE", f"/{tmp_path}/bursar.db")
    with Bursar(url, [Budget("b", "1 USD")]) as first:
        second = Bursar(first.store if url == "memory:" else url, [Budget("b", "0.01 USD")])
        with pytest.raises(BudgetExceeded) as caught:
            first.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=1)
        assert str(caught.value.limit) == "0.01"
        assert first.guard.policy.version == second.guard.policy.version == 2
        if url != "memory:":
            second.close()


def test_accounts_of_a_budget_are_bounded() -> None:
    with Bursar("memory:", [Budget("b", "1 USD", per="user")], max_accounts=3) as bursar:
        for number in range(5):
            with bursar.scope(user=f"u{number}"):
                if number < 3:
                    bursar.charge("0.01 USD")
                    continue
                with pytest.raises(StoreError, match="raise max_accounts") as caught:
                    bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)
                assert caught.value.fault == "accounts"
        assert len(bursar.status()) == 3
