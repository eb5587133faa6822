"""Hostile values: numbers that no account holds, texts that a terminal, a spreadsheet or a chat obeys, answers made to hurt."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bursar import (
    ApprovalRequired,
    Budget,
    Bursar,
    BursarError,
    InvalidInput,
    Operator,
    PolicyError,
    PriceBook,
    StoreError,
    Usage,
)
from bursar.alerts import Alert, Deliverer, Message
from bursar.alerts.routes import Alerts
from bursar.answers import StreamReader
from bursar.cli import main
from bursar.cli import price as price_command
from bursar.cli.options import _cell
from bursar.commands import Tell
from bursar.detect import Detectors
from bursar.errors import UnreadableAnswer
from bursar.money import nanos
from bursar.prices import Override
from bursar.scope import check_tags
from bursar.stores import open_store

HUGE = 10**5_000  # Python writes out no integer of so many digits
ODD_NUMBERS = [HUGE, -HUGE, -1, 2**63, float("nan"), float("inf"), -0.5, True, "5", None]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\r"


def quiet(**more: Any) -> Bursar:
    return Bursar("memory:", [Budget("b", "1 USD")], detectors="off", **more)


@pytest.mark.parametrize("value", ODD_NUMBERS, ids=lambda value: str(type(value)))
@pytest.mark.parametrize("name", ["input_tokens", "output_tokens", "images", "stated_cost_nanos"])
def test_a_usage_counts_whole_numbers_from_0(name: str, value: Any) -> None:
    """A bill below nothing would fill a budget up; None is a bill that nobody stated."""
    if (name, value) == ("stated_cost_nanos", None):
        return
    with pytest.raises(InvalidInput):
        Usage(**{name: value})


@pytest.mark.parametrize("name", ["model", "service_tier", "region"])
@pytest.mark.parametrize("value", [5, "x" * 10_000, "\ud800", "\0"])
def test_a_usage_names_what_can_be_stored(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput):
        Usage(**{name: value})
    with pytest.raises(InvalidInput):
        Usage(server_tools={value: 1})


@pytest.mark.parametrize(
    "use",
    [
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=1, n=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=1, retries=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=1, ttl_s=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", body={"max_tokens": HUGE, "messages": []}),
        lambda bursar: bursar.reserve("openai", "gpt-4o", body={"n": HUGE, "messages": []}),
        lambda bursar: bursar.charge(HUGE),
        lambda bursar: bursar.charge("0." + "1" * 1_000_000 + " USD"),
        lambda bursar: bursar.charge("1e99999999 USD"),
        lambda bursar: bursar.charge("NaN USD"),
        lambda bursar: bursar.charge("-Infinity USD"),
        lambda bursar: bursar.charge("-0.01 USD"),
        lambda bursar: bursar.scope(run=HUGE).__enter__(),
        lambda bursar: Bursar(max_accounts=-HUGE),
        lambda bursar: nanos(HUGE),
        lambda bursar: Override(model="m", discount="1e99999999%"),
        lambda bursar: Override(model="m", input_mtok="1e99999999"),
        lambda bursar: Override(model="m", input_mtok="1/" + "3" * 1_000_000),
        lambda bursar: Override(model="m", context_window=-1),
        lambda bursar: Override(model="m", max_output_tokens=HUGE),
        lambda bursar: bursar.reserve("openai", "gpt-4o", input_tokens=1, id="x" * 1_000_000),
        lambda bursar: bursar.scope(**{f"tag{n}": "x" for n in range(100_000)}).__enter__(),
        lambda bursar: bursar.scope(run="x" * 10_000_000).__enter__(),
        lambda bursar: Budget("b", "9" * 10_000_000 + " USD"),
        lambda bursar: Budget("b", "1 USD", on_exceed="wait " + "9" * 1_000_000),
        lambda bursar: bursar.scope(carried="[" * 1_000_000).__enter__(),
        lambda bursar: bursar.scope(carried="bursar.scope=" + "%5B" * 1_000_000).__enter__(),
    ],
)  # fmt: skip
def test_what_no_account_holds_is_refused_at_once_and_in_few_words(use: Callable[[Bursar], object]) -> None:
    with quiet() as bursar, pytest.raises(BursarError) as caught:
        use(bursar)
    assert len(str(caught.value)) < 5_000


def test_the_remedy_of_a_long_error_is_not_cut_off() -> None:
    error = BursarError("It is wrong: " + "x" * 1_000_000 + ". Do this.")
    assert len(str(error)) < 5_000
    assert str(error).startswith("It is wrong")
    assert str(error).endswith("Do this.")


def deep(key: str, levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(levels):
        made = {key: made}
    return made


@pytest.mark.parametrize(
    "answer",
    [
        '{"usage": {"prompt_tokens": 1e999999999999999999999}}',
        'data: {"usage": {"prompt_tokens": 1e999999999999999999999}}\n\n',
        '{"usage": {"prompt_tokens": 1e400, "completion_tokens": 1}}',
        {"usage": {"prompt_tokens": HUGE, "completion_tokens": 1}},
        {"usage": {"prompt_tokens": float("nan"), "completion_tokens": 1}},
        {"usage": {"prompt_tokens": -5, "completion_tokens": 1}},
        {"usage": {"prompt_tokens": "0" * 60 + "12345678", "completion_tokens": 1}},
        {"usage": {"prompt_tokens": 5, "cost": -1}},
        {"usage": {"prompt_tokens": 5, "cost": "1e30"}},
        deep("usage_metadata", 5_000),
        deep("usageMetadata", 5_000),
        '{"usage_metadata":' * 900 + "1" + "}" * 900,
        "[" * 200_000,
        '{"a":' * 200_000,
        "data: {\n\n" * 100_000,
        b"\xff\xfe" * 1_000,
    ],
)  # fmt: skip
def test_an_answer_made_to_hurt_is_unreadable_and_nothing_else(answer: Any) -> None:
    for provider in ("openai", "google", "anthropic", "bedrock"):
        with pytest.raises(UnreadableAnswer):
            Usage.from_response(provider, answer)
        reader = StreamReader(provider)
        reader.feed(answer)
    with quiet() as bursar:
        call = bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        record = call.settle(answer)
        assert record is not None
        assert (record.cost_nanos, record.estimated) == (125_000, True)  # never for less than was reserved


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_what_a_model_writes_cuts_no_stream(sign: str) -> None:
    """Python's own `splitlines` splits at these, a stream of events does not."""
    events = [
        {"choices": [{"delta": {"content": f"a{sign}b"}}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}},
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in events]
    assert Usage.from_response("openai", "".join(f"data: {one}\r\n\r\n" for one in lines)).input_tokens == 5
    assert Usage.from_response("openai", "\n".join(lines)).input_tokens == 5


@pytest.mark.parametrize("sign", ["\ud800", "\0", "\x1b[2J"])
@pytest.mark.parametrize("store", ["memory:", "sqlite:///FILE"])
def test_i7_a_name_that_no_store_holds_costs_no_settlement(tmp_path: Path, store: str, sign: str) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    url = store.replace("FILE", str(tmp_path / "b.db"))
    with Bursar(url, [Budget("b", "1 USD")], detectors="off") as bursar:
        for answer in (
            {"model": f"gpt-4o{sign}", "choices": [], "usage": usage},
            {"model": "gpt-4o", "choices": [], "usage": {**usage, "connectors": {sign: 1}}},
        ):
            call = bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
            record = call.settle(answer, reason=sign, headers={"x-ratelimit-left": sign, "x-other": sign})
            assert record is not None
            assert record.cost_nanos > 0
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).release(sign)
        assert bursar.store.open_reservations() == 0
        assert all(text.isprintable() for one in bursar.records() for text in texts(one.as_dict()))


def texts(data: Any) -> list[str]:
    """Every text in plain data, keys included."""
    if isinstance(data, dict):
        return [text for pair in data.items() for one in pair for text in texts(one)]
    if isinstance(data, (list, tuple)):
        return [text for one in data for text in texts(one)]
    return [data] if isinstance(data, str) else []


@pytest.mark.parametrize("sign", ["\ud800", "\0", "\x1b[2J", "n" * 1_000_000])
def test_a_tool_of_that_name_hides_no_finding(tmp_path: Path, sign: str) -> None:
    """What a model calls stands in the finding of a loop, which has to reach the store."""
    detectors = Detectors(uncapped="off", loops="notify")
    with Bursar(f"sqlite:///{tmp_path / 'b.db'}", [Budget("b", "9 USD")], detectors=detectors) as bursar:
        with bursar.scope(run="r"):
            history: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
            for number in range(12):
                asked = {"id": f"c{number}", "type": "function", "function": {"name": f"f{sign}", "arguments": "{}"}}
                message = {"role": "assistant", "content": None, "tool_calls": [asked]}
                call = bursar.reserve("openai", "gpt-4o", messages=history, max_output_tokens=10)
                usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
                call.settle({"model": "gpt-4o", "choices": [{"message": message}], "usage": usage})
                history = [*history, message, {"role": "tool", "tool_call_id": f"c{number}", "content": "same"}]
        found = [alert for alert, _ in bursar.store.alerts() if alert.kind == "detector"]
        assert found
        assert all(one.isprintable() and len(one) <= 2_000 for alert in found for one in texts(alert.facts))


# -- terminals, spreadsheets, chats


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Commands that simulate silence the log of their process, which is that of other tests here."""
    log = logging.getLogger("bursar")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def defaced(tmp_path: Path) -> str:
    """A store in which somebody has put escape sequences wherever a name stands, past Bursar's own checks."""
    file = tmp_path / "b.db"
    url = f"sqlite:///{file}"
    with (
        Bursar(url, [Budget("b", "1 USD", per="agent")], detectors="off") as bursar,
        bursar.scope(agent="MARK", run="r"),
    ):
        bursar.charge("0.10 USD", tool="MARK")
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        bursar.store.execute(Tell("a", "frozen", {"name": "MARK", "why": "MARK", "tags": {"agent": "MARK"}}))
        Operator(bursar.store, by="MARK").freeze({"agent": "MARK"}, why="MARK")
        question = {"state": "open", "why": "MARK", "owner": "MARK", "tags": {"agent": "MARK"}}
        key = next(bursar.store.accounts()).rule.key
        bursar.store.publish({"ask-MARK": {**question, "account": key}}, "approval")
        bursar.store.publish({"MARK": {"name": "MARK", "limit": "1 USD"}})
    escaped = json.dumps(ESCAPES)[1:-1]
    with sqlite3.connect(file) as connection:
        for table, columns in {
            "accounts": ("key", "budget", "scope"),
            "records": ("id", "draft", "reason", "agent", "tool", "amounts"),
            "reservations": ("draft", "held"),
            "definitions": ("name", "definition"),
            "alerts": ("id", "facts"),
        }.items():
            for column in columns:
                is_json = column in ("key", "scope", "draft", "amounts", "held", "definition", "facts")
                sign = escaped if is_json else ESCAPES
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, 'MARK', ?)", (sign,))
    return url


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["records"],
        ["records", "--format", "json"],
        ["records", "--format", "csv"],
        ["status", "--format", "json"],
        ["resume"],
        ["resume", "nothing"],
        ["approvals"],
        ["alerts"],
        ["audit"],
        ["exposure"],
        ["replay"],
        ["replay", "--calls"],
        ["policy", "explain", "POLICY", "agent=x"],
        ["policy", "apply", "POLICY"],
    ],
    ids=" ".join,
)
def test_no_name_in_the_store_reaches_the_terminal_as_more_than_text(
    defaced: str, tmp_path: Path, command: list[str]
) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('[[budget]]\nname = "own"\nlimit = "1 USD"\n')
    words = [str(policy) if word == "POLICY" else word for word in command]
    told = CliRunner(env={"COLUMNS": "300"}).invoke(main, [*words, "--store", defaced])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    assert told.output
    signs = set(told.output) - {"\n"} - ({"\r"} if "csv" in command else set())
    assert all(sign.isprintable() for sign in signs), sorted(sign for sign in signs if not sign.isprintable())


@pytest.mark.parametrize("facts", [{"at": "x", "limit": "y"}, {"at": 1, "limit": []}, {"at": 10**30, "limit": 1}])
def test_an_alert_of_rubbish_hides_no_other_from_the_operator(tmp_path: Path, facts: dict[str, Any]) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with Bursar(url, [Budget("b", "1 USD", thresholds=[{"at": "50%", "action": "notify"}])]) as bursar:
        bursar.store.execute(Tell("rubbish", "threshold", facts))
        bursar.charge("0.60 USD")
    told = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["alerts", "--store", url])
    assert told.exit_code == 0, told.exception
    assert "b notify at 50%" in told.output


@pytest.mark.parametrize("more", [{}, {"limit": "5 USD", "of_a_newer_version": 1}])
def test_a_budget_that_this_version_cannot_read_is_told_by_name(tmp_path: Path, more: dict[str, Any]) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with Bursar(url, [Budget("b", "1 USD")]) as bursar:
        bursar.store.publish({"other": {"name": "other", **more}})
        bursar.charge("0.10 USD")  # it has budgets of its own
    with pytest.raises(PolicyError, match="'other' cannot be read"):
        Bursar(url)
    told = CliRunner().invoke(main, ["status", "--store", url])
    assert (told.exit_code, "policy apply" in told.output) == (1, True)


def test_i7_a_cost_is_booked_by_the_policy_of_before_where_the_new_one_cannot_be_read() -> None:
    store = open_store("memory:")
    with Bursar(store, [Budget("b", "1 USD")]) as bursar:
        bursar.charge("0.10 USD")
        with Bursar(store) as other:
            store.publish({"other": {"name": "other", "limit": "5 USD", "of_a_newer_version": 1}})
            other.charge("0.20 USD")
            with pytest.raises(PolicyError, match="cannot be read"):
                other.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        assert [str(one.spent) for one in bursar.status()] == ["0.30"]


@pytest.mark.parametrize(("scope", "tags"), [(["x"], {}), ("x", {}), ({}, ["agent"]), ({}, "agent"), (None, {})])
def test_a_question_of_rubbish_hides_no_other_from_the_operator(tmp_path: Path, scope: Any, tags: Any) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with Bursar(url, [Budget("b", "1 USD", thresholds=[{"at": "50%", "action": "ask"}])]) as bursar:
        rubbish = {"state": "open", "account": json.dumps(["b", "USD", "w", scope, 0]), "tags": tags, "why": ""}
        bursar.store.publish({"ask-rubbish": rubbish}, "approval")
        bursar.charge("0.60 USD")
        with pytest.raises(ApprovalRequired) as caught:
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    told = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["approvals", "--store", url])
    assert told.exit_code == 0, told.exception
    assert caught.value.id in told.output


def test_what_one_may_copy_into_a_shell_is_quoted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"
    Bursar(url, []).close()
    told = CliRunner().invoke(main, ["freeze", "--agent", "x'; touch owned; '", "--store", url])
    command = told.output.partition("bursar resume ")[2].strip()
    assert len(shlex.split(command)) == 1
    assert "touch" in shlex.split(command)[0]


@given(st.text(alphabet="=+-@\t\r\n; ,'\"a1＝＋－＠", max_size=12))
def test_no_cell_of_a_csv_begins_a_formula(text: str) -> None:
    """Nor where a spreadsheet takes semicolons or tabs for the ends of cells."""
    out = io.StringIO()
    csv.writer(out).writerow([_cell(text)])
    number = re.compile(r"-?\d+(\.\d*)?")
    for cells in (next(csv.reader(io.StringIO(out.getvalue(), newline=""))), re.split(r"[;\t\r\n]", _cell(text))):
        assert not any(cell.startswith(tuple("=+-@＝＋－＠")) and not number.fullmatch(cell) for cell in cells)


@pytest.mark.parametrize(
    "name",
    ["<!channel>", "@everyone", "<https://evil.example|Approve>", "[Approve](https://evil.example)", "<img src=x>"],
)
def test_no_chat_takes_a_name_for_a_mention_a_link_or_html(name: str) -> None:
    message = Message(
        (Alert("a", "threshold", 0, {"budget": name, "tags": {"agent": name}, "unit": name, name: name}),)
    )
    for text in (message.title, message.text):
        assert name not in text
        assert re.search(r"<[!@#a-z]|\]\(|@everyone", text) is None


RUBBISH: list[dict[str, Any]] = [
    {"until_us": 10**400, "at_us": -1},
    {"at": HUGE, "limit": 1},
    {"limit": HUGE, "unit": "USD"},
    {"spent": 2**63, "unit": ESCAPES},
    {"tags": {"agent": HUGE}},
    {"account": "[" * 100_000, "scope": "[" * 100_000},
    {"why": "x" * 10_000_000},
    {"budget": HUGE, "owner": ["x"], "was": {}},
    {"budget": "\ud800"},
    {"nan": float("nan"), "deep": deep("x", 900)},
]


@pytest.mark.parametrize("facts", RUBBISH, ids=lambda facts: " ".join(facts))
def test_rubbish_in_an_alert_is_told_and_holds_up_no_other(facts: dict[str, Any]) -> None:
    """Else one alert of an agent's own would keep what it did from the operator."""
    told: list[Message] = []
    with quiet() as bursar:
        bursar.store.execute(Tell("rubbish", "frozen", facts))
        bursar.store.execute(Tell("other", "frozen", {"name": "agent=x"}))
        delivery = Deliverer(bursar.store, Alerts([told.append]))
        delivery.tend()
        assert {alert.id for message in told for alert in message.alerts} == {"rubbish", "other"}
        assert all(told for _, told in bursar.store.alerts())
    for message in told:
        json.loads(message.body(), parse_constant=pytest.fail)
        assert len(message.body()) < 100_000
        assert all(line.replace("\u200b", "").isprintable() for line in message.text.split("\n"))


def test_an_alert_at_no_time_of_the_calendar_is_told() -> None:
    for at_us in (-(10**18), 2**63 - 1, 10**30):
        message = Message((Alert("a", "frozen", at_us, {}),))
        assert message.text
        json.loads(message.body())


# -- ids


def test_i6_a_replayed_id_settles_nothing_twice_and_loses_no_cost_in_silence(tmp_path: Path) -> None:
    """Who knows an id, and what it is for, gets the same reservation: whoever ends it second is told."""
    url = f"sqlite:///{tmp_path / 'b.db'}"
    said: dict[str, Any] = {"id": "call-1", "input_tokens": 1_000, "max_output_tokens": 500}
    with Bursar(url, [Budget("b", "1 USD")], detectors="off") as victim, Bursar(url, detectors="off") as thief:
        with victim.scope(run="r"), thief.scope(run="r"):
            mine = victim.reserve("openai", "gpt-4o", **said)
            with pytest.raises(BursarError):  # other content
                thief.reserve("openai", "gpt-4o", **said | {"max_output_tokens": 5, "input_tokens": 1})
            same = thief.reserve("openai", "gpt-4o", **said)
        same.settle(Usage(input_tokens=1, output_tokens=0))
        with pytest.raises(BursarError):
            mine.settle(Usage(input_tokens=1_000, output_tokens=500))
        assert len(list(victim.records())) == 1


@pytest.mark.parametrize("id", ["x~", "x!1", "[x", "#b", "@policy", "@operator", "^a", "", "\0", "\x1b[2J", "x" * 201])
def test_an_id_is_never_another_row_of_the_store(id: str) -> None:
    with quiet() as bursar:
        with pytest.raises(InvalidInput):
            bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1, id=id)
        with pytest.raises(InvalidInput):
            bursar.charge("1 USD", id=id)


def test_a_sum_beyond_every_account_changes_nothing(tmp_path: Path) -> None:
    with Bursar(f"sqlite:///{tmp_path / 'b.db'}", [Budget("b", "1 USD")], detectors="off") as bursar:
        bursar.charge("4600000000 USD")
        bursar.charge("4600000000 USD")
        with pytest.raises(StoreError) as caught:
            bursar.charge("4600000000 USD")
        assert caught.value.fault == "overflow"
        assert bursar.status()[0].spent == 9_200_000_000


@pytest.mark.parametrize("name", ["a b", 'a"b', "x" * 65, "1a", "a'; --", "\u00e9", "a\n"])
def test_a_tag_has_a_plain_name(name: str) -> None:
    with pytest.raises(InvalidInput):
        check_tags({name: "x"})


def test_an_own_price_is_never_negative() -> None:
    for text in ("-1", "1/-3", "-0.0000001", "1e-5x"):
        with pytest.raises(InvalidInput):
            PriceBook.packaged().with_overrides([Override(model="m", input_mtok=text)])
        with pytest.raises(InvalidInput):
            PriceBook.packaged().with_overrides(tools={"t": text})


def test_a_file_of_answers_that_unpacks_to_more_than_memory_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_command, "MAX_LINE", 1_000)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b"[" * 10_000 + b"\n" + b'{"id": "last", "provider": "openai", "response": {}}\n')
    assert max(map(len, price_command._lines(str(tmp_path / "a.jsonl.gz")))) <= 1_000
    told = CliRunner().invoke(main, ["price", str(tmp_path / "a.jsonl.gz")])
    found = [json.loads(line) for line in told.output.splitlines()]
    assert {one["status"] for one in found[:-1]} == {"unreadable"}
    assert found[-1]["id"] == "last"
