"""Policy files: what may stand in them, how faults are named, and that a Bursar is made of all of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from bursar import BudgetExceeded, Bursar, InvalidInput, PolicyError, Stopped, Usage
from bursar.budget import parse_limit
from bursar.policy_file import read_policy
from bursar.policy_file.advice import advice
from bursar.policy_file.lines import parse_toml

A = '[[budget]]\nname = "a"\nlimit = "5 USD"\n'
WRONG_FILES = [
    ("b.toml", f'{A}\n[[budget]]\nname = "b"\nlimit = "5 dollars"\n', 7, "limit"),
    ("b.toml", f'{A}windw = "day"\n', 4, "windw"),
    ("b.toml", 'stor = "memory:"\n', 1, "stor"),
    ("b.toml", 'store = "memory:\n', 1, None),
    ("b.toml", f'{A}estimate = "exact"\n', 4, "estimate"),
    ("b.toml", '[rates]\nEUR = "many"\n', 2, "EUR"),
    ("b.toml", f"{A}{A}", 5, "budget.1.name"),
    ("b.toml", '[[budget]]\nname = "a"\nlimit = "5 EUR"\n', 3, "budget.0.limit"),
    ("b.toml", f'{A}thresholds = [\n  {{ at = "50%", action = "notify" }},\n  {{ at = "80 %", action = "ask" }},\n]\n', 6, "at"),
    ("b.toml", f'{A}thresholds = [\n  {{ at = "50%", action = "clamp" }},\n]\n', 5, "budget.0.thresholds.0"),
    ("b.toml", f'{A}thresholds = [{{ at = "50%", action = "shout" }}]\n', 4, "budget.0.thresholds.0.action"),
    ("b.toml", f'{A}[[budget.thresholds]]\nat = "50%"\naction = "ask"\n[[budget.thresholds]]\nat = 5\n', 8, "thresholds.1.at"),
    ("b.toml", '[[budget]]\nname = "a"\nlimit = "5 slots"\nthresholds = [{ at = "50%", action = "ask" }]\n', 4, "thresholds"),
    ("b.toml", "[detectors]\nloops = 'shout'\n", 2, "detectors.loops"),
    ("b.toml", "[detectors]\nrepetitions = 1\n", 2, "detectors.repetitions"),
    ("b.toml", "[detectors]\nloop = 'ask'\n", 2, "detectors.loop"),
    ("b.toml", "\ndetectors = 'maybe'\n", 2, "detectors"),
    ("b.toml", "\nrequire = ['te am']\n", 2, None),
    ("b.toml", "\nrequire = 'team'\n", 2, "require"),
    ("b.toml", "\ndefault_limit = '5 slots'\n", 2, "default_limit"),
    ("b.toml", "\ndefault_limit = 'much'\n", 2, "default_limit"),
    ("b.toml", 'default_limit = "1 USD"\n[[budget]]\nname = "(default)"\nlimit = "5 USD"\n', 3, "budget.0.name"),
    ("b.toml", "[[alert]]\nlog = true\n[[alert]]\nurl = 'ntfy://x'\nlog = true\n", 3, "alert.1"),
    ("b.toml", f"x = {'[' * 5_000}{']' * 5_000}\n", None, None),
    ("b.toml", f"x = {'9' * 5_000}\n", None, None),
    ("b.yaml", "budget:\n  - name: a\n    limit: 5 USD\n  - name: b\n    limit: 5\n", 5, "limit"),
    ("b.yaml", "budget:\n  - name: a\n    limit: 5 USD\n    per: [run, 3]\n", 4, "per"),
    ("b.yaml", "budget:\n  - name: a\n   limit: 5 USD\n", 3, None),
    ("b.yaml", "budget:\n- name: a\n  limit: 5 USD\n  thresholds: [{at: 5%, action: ask},\n    {at: 0%, action: ask}]\n", 5, "at"),
    ("b.yaml", "detectors:\n  loops: ask\n  stale: 5\n", 3, "detectors.stale"),
    ("b.yml", "budget: 5\n", 1, "budget"),
    ("b.yaml", "a: &a [x]\nb: *a\n", 2, None),
    ("b.yaml", "- 1\n- 2\n", None, None),
    ("b.yaml", "x: 2026-13-45\n", None, None),
    ("b.yaml", f"x: {'[' * 5_000}{']' * 5_000}\n", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "line", "key"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_wrong_file_names_file_line_and_key(
    tmp_path: Path, name: str, text: str, line: int | None, key: str | None
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        Bursar.from_policy(path)
    error = caught.value
    assert error.file == str(path)
    assert str(path) in str(error)
    if line is not None:
        assert error.line == line
    if key is not None:
        assert key in error.key
    assert str(error).endswith(".")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        Bursar.from_policy(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'store = "\xff"')
    with pytest.raises(PolicyError, match="UTF-8"):
        Bursar.from_policy(tmp_path / "latin.toml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(PolicyError, match="Split a policy"):
        Bursar.from_policy(tmp_path / "large.yaml")


THORNY = '''# a comment with [brackets] = "and more"
top = "a # no comment, [no table], no = pair"
"quoted key" = 1
dotted.deep.key = { inline = [1, [2, 3], { x = """
several
lines""" }], 'y' = 2026-01-01 07:32:00 }
multi = [
  "a,]}",   # , ]
  { at = 'c:\\', action = 1 },

  [],
]
text = \'\'\'
[not.a.table]
key = 1\'\'\'
[table."with dot.s"]
k = 1
[[many]]
k = 1
[[many]]
[[many.inner]]
k = 1
[many.inner.sub]
k = 1
[[many.inner]]
k = 2
'''


def test_every_place_of_a_toml_file_has_its_line() -> None:
    data, lines = parse_toml(THORNY)
    rows = THORNY.splitlines()

    def check(value: Any, place: tuple[str | int, ...]) -> None:
        if place:
            assert place in lines, place
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ():
            if isinstance(key, str):
                assert key in rows[lines[(*place, key)] - 1], (*place, key)
            check(inner, (*place, key))

    check(data, ())
    assert set(lines) >= {("multi", 1, "at"), ("dotted", "deep", "key", "inline", 2, "x")}
    assert lines["dotted", "deep", "key", "y"] == 6
    assert lines["multi", 1, "action"] == 9
    assert [lines["many", 1, "inner", index, "k"] for index in (0, 1)] == [22, 26]
    assert lines["many", 1, "inner", 0, "sub", "k"] == 24


def test_off_and_no_are_words_in_yaml_too(tmp_path: Path) -> None:
    """As in YAML 1.2, and as whoever writes `mode: off` means it; 1.1 takes them for true and false."""
    text = "detectors: off\nbudget:\n  - {name: a, limit: 5 USD, mode: off, match: {country: [no, yes]}, owner: on}\n"
    (tmp_path / "p.yaml").write_text(text)
    policy = read_policy(tmp_path / "p.yaml")
    (budget,) = policy.budget
    assert (policy.detectors, budget.mode, budget.match, budget.owner) == (
        "off",
        "off",
        {"country": ["no", "yes"]},
        "on",
    )
    (tmp_path / "p.yaml").write_text("store: true\n")
    with pytest.raises(PolicyError):
        read_policy(tmp_path / "p.yaml")


def test_toml_and_yaml_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    (tmp_path / "p.toml").write_text(
        'store = "memory:"\n[[budget]]\nname = "a"\nlimit = "5 EUR"\nper = "run"\n'
        'thresholds = [{ at = "50%", action = "clamp", max_output_tokens = 5 }]\n'
        '[budget.match]\nteam = ["x", "y"]\n[rates]\nEUR = "1.10"\n'
    )
    (tmp_path / "p.yaml").write_text(
        "store: 'memory:'\nbudget:\n- {name: a, limit: 5 EUR, per: run, match: {team: [x, y]},\n"
        "   thresholds: [{at: 50%, action: clamp, max_output_tokens: 5}]}\nrates: {EUR: '1.10'}\n"
    )
    first, second = (Bursar.from_policy(tmp_path / name) for name in ("p.toml", "p.yaml"))
    assert first.guard.policy.budgets == second.guard.policy.budgets
    assert parse_limit(first.guard.policy.budgets[0]).amount == 5_500_000_000
    first.close()
    second.close()


def test_limits_of_other_currencies_are_published_in_dollars(tmp_path: Path) -> None:
    """So a process that knows no rates, such as `bursar status`, reads the same limit as everybody else."""
    store = f"sqlite:///{tmp_path / 'b.db'}?durability=process"
    path = tmp_path / "p.toml"
    path.write_text(
        f'store = "{store}"\n[[budget]]\nname = "a"\nlimit = "5 EUR"\n[[budget]]\nname = "b"\nlimit = "1 EUR/hour"\n'
        '[rates]\nEUR = "1.0000000001"\n'
    )
    Bursar.from_policy(path).close()
    with Bursar(store) as other:
        assert {one.name: str(one.limit) for one in other.status()} == {"a": "5.000000001", "b": "1.00"}


WHOLE = """store = "memory:"
require = ["team"]
default_limit = "0.02 USD"

[detectors]
loops = "kill"
max_steps = 7

[[budget]]
name = "run"
limit = "0.02 USD"
per = "run"
match = { team = "a" }
thresholds = [
  { at = "50%", action = "downgrade", models = { gpt-4o = "gpt-4o-mini" } },
  { at = "100%", action = "kill" },
]

[[alert]]
log = true

[[price]]
model = "gpt-4o"
provider = "openai"
input_mtok = "10"
output_mtok = "10"
"""


def test_a_bursar_is_made_of_all_that_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BURSAR_STORE", raising=False)
    path = tmp_path / "p.toml"
    path.write_text(WHOLE)
    usage = Usage(input_tokens=500, output_tokens=500)
    with Bursar.from_policy(path) as bursar:
        with pytest.raises(Stopped, match="carries no team"):
            bursar.reserve("openai", "gpt-4o", usage=usage)
        with bursar.scope(team="a", run="r"):
            assert bursar.reserve("openai", "gpt-4o", usage=usage).settle(usage).cost_nanos == 10_000_000
            swapped = bursar.reserve("openai", "gpt-4o", input_tokens=500, max_output_tokens=500)
            assert swapped.model == "gpt-4o-mini"
            swapped.release()
            bursar.charge("0.01 USD")
            with pytest.raises(BudgetExceeded):
                bursar.reserve("openai", "gpt-4o-mini", usage=usage)
        with bursar.scope(team="b", run="r2"):
            bursar.charge("0.02 USD")
            with pytest.raises(BudgetExceeded) as caught:
                bursar.reserve("openai", "gpt-4o", usage=usage)
            assert (caught.value.budget, caught.value.scope) == ("(default)", {"run": "r2"})
        settings = bursar.guard.notices.sentry.settings
        assert settings is not None
        assert (settings.loops, settings.max_steps, settings.stale) == ("kill", 7, "ask")
        assert bursar._deliverer is not None


def test_what_the_program_says_itself_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(WHOLE.replace("memory:", f"sqlite:///{tmp_path / 'b.db'}"))
    with Bursar.from_policy(path, detectors="off", require=[], alerts=None, tags={"team": "x"}) as bursar:
        assert bursar.guard.notices.sentry.settings is None
        assert bursar._deliverer is None
        bursar.reserve("openai", "gpt-4o-mini", input_tokens=1, max_output_tokens=1).release()
    with pytest.raises(InvalidInput, match="The budgets stand in the policy file"):
        Bursar.from_policy(path, budgets=[])


@pytest.mark.parametrize(
    ("said", "acts", "watches"),
    [("", False, True), ('detectors = "report"\n', False, True), ('detectors = "off"\n', False, False),
     ("[detectors]\n", True, True)],
)  # fmt: skip
def test_detectors_report_unless_told_otherwise(tmp_path: Path, said: str, acts: bool, watches: bool) -> None:
    path = tmp_path / "p.toml"
    path.write_text('store = "memory:"\n' + said)
    with Bursar.from_policy(path) as bursar:
        assert (bursar.guard.notices.sentry._acts, bursar.guard.notices.sentry.settings is not None) == (acts, watches)


def test_a_missing_secret_is_named_before_anything_is_published(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    store = tmp_path / "b.db"
    path.write_text(
        f'store = "sqlite:///{store}"\n{A}[[alert]]\nwebhook = "https://x.example/"\nsecret_env = "NO_SUCH_VARIABLE"\n'
    )
    with pytest.raises(PolicyError, match="NO_SUCH_VARIABLE"):
        Bursar.from_policy(path)
    assert not store.exists()


# -- advice ----------------------------------------------------------------------------------------------------------


def advised(tmp_path: Path, *budgets: dict[str, Any], has_operator: bool = False, more: str = "") -> list[str]:
    import json

    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"budget": [{"limit": "5 USD", **one} for one in budgets]}) + more)
    return advice(read_policy(path), has_operator=has_operator)


def test_a_question_that_nobody_can_answer_is_a_warning(tmp_path: Path) -> None:
    asking = {"name": "a", "thresholds": [{"at": "50%", "action": "ask"}]}
    assert [line[:31] for line in advised(tmp_path, asking)] == ["The budget 'a' asks, but its st"]
    assert advised(tmp_path, asking, has_operator=True) == []
    path = tmp_path / "d.toml"
    path.write_text("[detectors]\nstale = 'off'\n")
    assert advice(read_policy(path), has_operator=False)[0].startswith("The detectors limits ask")
    assert advice(read_policy(path), has_operator=True) == []


def test_thresholds_in_shadow_mode_are_a_warning(tmp_path: Path) -> None:
    shadow = {"name": "a", "mode": "shadow", "thresholds": [{"at": "50%", "action": "block"}]}
    assert "its thresholds (block) are only told" in advised(tmp_path, shadow)[0]
    assert advised(tmp_path, {**shadow, "thresholds": [{"at": "50%", "action": "notify"}]}) == []


@pytest.mark.parametrize(
    ("small", "large", "hidden"),
    [
        ({"limit": "4 USD"}, {}, True),
        ({}, {}, True),
        ({"limit": "6 USD"}, {}, True),  # then it is the other way round
        ({"limit": "4 USD"}, {"per": "run"}, True),
        ({"limit": "4 USD", "per": "run"}, {}, False),
        ({"limit": "4 USD", "per": "run"}, {"per": ["team", "run"]}, True),
        ({"limit": "4 USD", "match": {"team": "a"}}, {}, False),
        ({"limit": "4 USD"}, {"match": {"team": "a"}}, True),
        ({"limit": "4 USD", "window": "month"}, {"window": "day"}, True),
        ({"limit": "4 USD", "window": "month"}, {"window": "week"}, False),
        ({"limit": "4 USD", "window": "day"}, {"window": "month"}, False),
        ({"limit": "4 USD", "window": "month", "tz": "Asia/Tokyo"}, {"window": "day"}, False),
        ({"limit": "4 USD"}, {"window": "rolling 10m"}, True),
        ({"limit": "4 USD", "window": "day"}, {"window": "rolling 10m"}, False),
        ({"limit": "4 tokens"}, {}, False),
        ({"limit": "4 USD", "mode": "shadow"}, {}, False),
        ({"limit": "4 USD", "mode": "off"}, {}, False),
        ({"limit": "4 slots"}, {"limit": "5 slots"}, True),
        ({"limit": "4 requests/minute"}, {"limit": "5 requests/minute"}, True),
        ({"limit": "4 requests/hour"}, {"limit": "5 requests/minute"}, False),
    ],
)
def test_a_budget_that_never_comes_into_play_is_a_warning(
    tmp_path: Path, small: dict[str, Any], large: dict[str, Any], hidden: bool
) -> None:
    found = advised(tmp_path, {"name": "small", **small}, {"name": "large", **large})
    assert len(found) == hidden
    assert all("can never refuse a call" in line for line in found)


def test_a_missing_secret_is_only_a_warning_of_the_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.toml"
    path.write_text("[[alert]]\nwebhook = 'https://x.example/'\nsecret_env = 'NO_SUCH_VARIABLE'\n")
    with caplog.at_level(logging.WARNING):
        (line,) = advice(read_policy(path), has_operator=False)
    assert "NO_SUCH_VARIABLE" in line
    assert not caplog.records
