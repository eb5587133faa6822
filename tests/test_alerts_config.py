"""Who is told of what: routes, owners, the `[[alert]]` tables; and secrets, which stand nowhere."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks
from pydantic import ValidationError
from receiver import KEY, SECRET, Receiver, an_alert, tell, untold

from bursar import PolicyError
from bursar.alerts import Alerts, Apprise, Deliverer, Message, Route, Webhook
from bursar.alerts.config import AlertEntry, make_alerts
from bursar.clock import SystemClock
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.testing import ManualClock

TOKEN = "tOkEn0123456789"


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


class Named:
    """A sink that is only looked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def send(self, message: Message, now_us: int) -> None:
        raise AssertionError("only looked for")


def who(alerts: Alerts, kind: str, budget: str, **facts: Any) -> list[str]:
    return [route.sink.name for _, route in alerts.of(an_alert(1, 0, kind, budget, **facts))]


def test_a_route_takes_its_kinds_and_budgets_and_the_rest_is_logged() -> None:
    alerts = Alerts([Route(Named("pager"), kinds=["frozen", "detector"]), Route(Named("chat"), budgets=["team-*"])])
    assert who(alerts, "frozen", "run") == ["pager"]
    assert who(alerts, "detector", "team-a") == ["pager", "chat"]
    assert who(alerts, "resolved", "run", was="detector") == ["pager"]
    assert who(alerts, "resolved", "run", was="threshold") == ["log"]
    assert who(alerts, "resolved", "run") == ["pager"]  # of what is not said: better told than not
    assert who(Alerts([print]), "policy", "") == ["function print"]
    assert Alerts([print]).configured
    assert not Alerts().configured


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"kinds": ["thresholds"]}, "kinds"),
        ({"kinds": "threshold"}, "kinds"),
        ({"budgets": "team"}, "budgets"),
        ({"per_minute": 0}, "per_minute"),
    ],
)
def test_a_wrong_route_says_what_is_wrong(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Route(Named("chat"), **wrong)
    assert caught.value.key == key
    with pytest.raises(PolicyError, match="A str is no sink"):
        Alerts(["slack://somewhere"])  # type: ignore[list-item]


def test_an_owner_is_told_and_nobody_else_s_owner(
    store: Store, clock: ManualClock, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """By name, by pattern with the owner in the address, or by an address of its own; who is not reached is said once."""
    base = f"json://127.0.0.1:{receiver.port}"
    alerts = make_alerts(
        [
            AlertEntry(url=f"{base}/all"),
            AlertEntry(url=f"{base}/red-team", owner="red"),
            AlertEntry(url=f"{base}/to/{{owner}}", owner="#*"),
            AlertEntry(url=f"{base}/mail/{{owner}}", owner="*@*"),
            AlertEntry(webhook=f"{receiver.url}/{{owner}}", secret_env="SECRET", owner="hook-*", kinds=["frozen"]),
        ],
        {"SECRET": SECRET},
    )
    owners = ["red", "#spend", "mailto:cfo@example.com", f"{base}/own/{TOKEN}", "nobody", "hook-a", None]
    delivery = Deliverer(store, alerts)
    for number, owner in enumerate([*owners, "nobody"]):
        tell(store, number, "frozen", f"b{number}", owner=owner, why=f"ask {owner}")
    tell(store, 9, "threshold", "b9", owner="hook-a")
    for _ in range(3):
        delivery.tend()
        clock.advance(60)
    paths = [got.path for got in receiver.got]
    assert sorted(path for path in paths if path != "/all") == [
        "/hook/hook-a",
        "/mail/cfo@example.com",
        f"/own/{TOKEN}",
        "/red-team",
        "/to/%23spend",
    ]
    assert paths.count("/all") == 9
    assert not untold(store)
    assert caplog.text.count("no alert route reaches the owner nobody") == 1
    assert "hook-a" not in caplog.text
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in got.body for got in receiver.got)  # an owner's address is nobody else's business


def test_apprise_is_given_words_for_people(store: Store, clock: ManualClock, receiver: Receiver) -> None:
    receiver.statuses = [500, 200]
    delivery = Deliverer(store, Alerts([Apprise(f"json://127.0.0.1:{receiver.port}/{{group}}")]))
    tell(store, 1, "frozen", who="ann", why="runaway")
    tell(store, 2, "resolved", was="frozen")
    for _ in range(12):
        delivery.tend()
        clock.advance(5)
    bodies = [json.loads(got.body) for got in receiver.got]
    assert [(body["title"], body["type"]) for body in bodies] == [
        ("Bursar: team: stopped", "failure"),
        ("Bursar: team: stopped", "failure"),  # the first was answered with 500
        ("Bursar: team: over: stopped", "success"),
    ]
    assert len({got.path for got in receiver.got}) == 1  # one incident, opened and closed
    assert len(receiver.got[0].path) == 17
    assert "who ann, why runaway" in bodies[0]["message"]
    assert not untold(store)


def test_the_specification_s_own_library_accepts_what_is_sent(receiver: Receiver) -> None:
    """And while a secret is being changed, holders of the old and of the new one accept it alike."""
    new = standardwebhooks.Webhook(bytes(reversed(KEY)))
    old = standardwebhooks.Webhook(KEY)
    secret = "whsec_Hx4dHBsaGRgXFhUUExIREA8ODQwLCgkIBwYFBAMCAQA"  # unpadded
    now_us = SystemClock().now_us()
    event = an_alert(1, now_us, agent="größer")
    Webhook(receiver.url, f"{secret} {SECRET}").send(Message((event,)), now_us)
    (got,) = receiver.got
    for key in (new, old):
        payload = key.verify(got.body, got.headers)
        assert payload["type"] == "bursar.alert.threshold"
        assert payload["data"]["alerts"][0]["facts"] == event.facts
        assert datetime.fromisoformat(payload["timestamp"]).tzinfo == UTC
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        old.verify(got.body + b" ", got.headers)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_c2hvcnQ=", "!!!!" + "c2VjcmV0" * 5, "é" * 40])
def test_a_secret_that_others_would_read_otherwise_is_refused(secret: str) -> None:
    """Lenient base64 drops what it does not know: two libraries would sign with two keys."""
    with pytest.raises(PolicyError, match="base64 of at least 24 bytes") as caught:
        Webhook("https://example.com/hook", secret)
    assert not secret or secret not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "one of url, webhook and log"),
        ({"url": "json://localhost", "log": True}, "one of url, webhook and log"),
        ({"webhook": "https://example.com"}, "secret_env"),
        ({"log": True, "secret_env": "NAME"}, "secret_env"),
        ({"webhook": "https://example.com", "secret_env": f"whsec_{TOKEN}="}, "name of an environment variable"),
        ({"webhook": f"https://me:{TOKEN}@example.com", "secret_env": "NAME"}, "holds a password"),
        ({"url": f"mailto://me:{TOKEN}@example.com"}, "holds a password"),
        ({"url": "slack://{owner}"}, "needs owner"),
        ({"log": True, "kinds": ["thresholds"]}, "kinds"),
        ({"log": True, "per_minute": 0}, "per_minute"),
        ({"log": True, "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong_and_no_secret(entry: dict[str, Any], said: str) -> None:
    """Without the libraries and the environment that delivery needs: a policy is checked anywhere."""
    with pytest.raises(ValidationError, match=said) as caught:
        AlertEntry(**entry)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "environ", "said"),
    [
        ({"url": f"gotify://example.com/{TOKEN}"}, {}, "holds a secret"),
        ({"url": "slack://${SLACK}/#spend"}, {}, "needs the environment variable SLACK"),
        ({"url": "slack://${SLACK}"}, {"SLACK": TOKEN}, "none that Apprise knows"),
        ({"url": "nosuch://${SLACK}"}, {"SLACK": TOKEN}, "none that Apprise knows"),
        ({"url": "json://a.example/${SLACK},json://b.example"}, {"SLACK": TOKEN}, "none that Apprise knows"),
        ({"webhook": "ftp://${HOST}/", "secret_env": "S"}, {"HOST": TOKEN, "S": SECRET}, "address is not usable"),
        ({"webhook": "https://[${HOST}/", "secret_env": "S"}, {"HOST": TOKEN, "S": SECRET}, "address is not usable"),
        ({"webhook": "https://example.com", "secret_env": "S"}, {"S": TOKEN}, "base64 of at least 24 bytes"),
    ],
)
def test_what_the_environment_gives_is_checked_without_being_told(
    entry: dict[str, Any], environ: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PolicyError, match=said) as caught:
        AlertEntry(**entry).make(environ)
    assert TOKEN not in "".join(traceback.format_exception(caught.value)) + repr(caught.value.fields) + caplog.text


@pytest.mark.parametrize("status", [200, 500, 0])
def test_secrets_stand_in_no_log_record_error_or_repr(
    status: int, store: Store, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the receivers answer, at the most talkative level of every logger."""
    caplog.set_level(logging.DEBUG)
    for name in ("apprise", "httpx", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.DEBUG)

    def mine(message: Message) -> None:
        raise OSError(f"https://example.com/{TOKEN} is down")

    with Receiver(status) as receiver:
        host = f"127.0.0.1:{receiver.port}"
        environ = {"TOKEN": TOKEN, "SECRET": SECRET}
        entries = [
            AlertEntry(webhook=f"http://{host}/${{TOKEN}}?key=${{TOKEN}}", secret_env="SECRET"),
            AlertEntry(url=f"gotify://{host}/${{TOKEN}}"),
            AlertEntry(url=f"json://user:${{TOKEN}}@{host}/"),
            AlertEntry(url=f"mmost://{host}/{'${TOKEN}' * 2}"),
            AlertEntry(url=f"json://{host}/{{owner}}", owner="*"),
        ]
        alerts = Alerts([*make_alerts(entries, environ).routes, mine])
        tell(store, 1, owner=f"json://{host}/{TOKEN}")
        delivery = Deliverer(store, alerts)
        for _ in range(3):
            delivery.tend()
            clock.advance(5)
        assert len(receiver.got) >= 5
    said = [caplog.text, repr(delivery), repr(alerts), repr(entries), *map(repr, alerts.routes)]
    said += [repr(route.sink) + route.sink.name for route in alerts.routes]
    for secret in (TOKEN, SECRET, SECRET.removeprefix("whsec_")):
        assert not [text for text in said if secret in text]
    assert "function test_secrets_stand_in_no_log" in caplog.text
    assert "OSError at test_alerts_config.py" in caplog.text


def test_the_program_s_own_use_of_those_libraries_is_logged_as_ever(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    import httpx

    caplog.set_level(logging.INFO)
    Webhook(receiver.url, SECRET).send(Message((an_alert(1, 0),)), 0)
    assert "HTTP Request" not in caplog.text
    httpx.post(receiver.url, headers={"webhook-id": "mine"})
    assert "HTTP Request" in caplog.text


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("httpx", lambda: Webhook("https://example.com", SECRET)),
        ("standardwebhooks", lambda: Webhook("https://example.com", SECRET)),
        ("apprise", lambda: Apprise("json://localhost")),
    ],
)
def test_a_library_that_is_missing_is_named_with_what_to_install(
    library: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PolicyError, match=rf'need {library}. Install it: `pip install "bursar\[alerts\]"`'):
        make()


def test_alerts_load_no_library_before_a_sink_needs_it() -> None:
    code = (
        "import sys; from bursar.alerts import *; Alerts([print]); Deliverer\n"
        "print({'apprise', 'httpx', 'standardwebhooks', 'pydantic', 'requests', 'asyncio'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
