"""Secrets: what agents say, and the keys that they say it with, stand in no record, log, alert or error of Bursar's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from canned import Canned, CannedProvider

from bursar import Budget, BudgetExceeded, Bursar, BursarError, Operator, Stopped, Threshold, Usage
from bursar.alerts import Deliverer, Message
from bursar.alerts.routes import Alerts
from bursar.detect import Detectors

openai = pytest.importorskip("openai")

PROMPT, KEY, ANSWER, ARGUMENT = (
    "what-she-asked-in-private",
    "sk-live-4815162342",
    "what-it-told-her",
    "her-account-number",
)
SECRETS = (PROMPT, KEY, ANSWER, ARGUMENT)
MESSAGES: list[Any] = [{"role": "system", "content": PROMPT}, {"role": "user", "content": PROMPT}]
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}


def answer(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": ANSWER, "tool_calls": None}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    plain = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o",
        "choices": [choice],
        "usage": USAGE,
    }
    return plain | changes


@pytest.fixture
def books(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Bursar]:
    """Whatever the test did: afterwards no secret is in the store's files, the log, or what is told and raised."""
    caplog.set_level(logging.DEBUG, "bursar")
    ladder = [Threshold("20%", "notify"), Threshold("60%", "ask"), Threshold("90%", "kill")]
    budgets = [Budget("b", "0.01 USD", per="run", thresholds=ladder), Budget("all", "5 USD")]
    url = f"sqlite:///{tmp_path / 'b.db'}"
    with Bursar(url, budgets, detectors=Detectors(loops="notify", stale="notify", retries="notify")) as bursar:
        yield bursar
        told: list[Message] = []
        Deliverer(bursar.store, Alerts([told.append])).tend()
        said = "".join(f"{one.title} {one.text} {one.body()}" for one in told)
        said += "".join(str(one.as_dict()) for one in bursar.records())
        said += str(Operator(bursar.store).questions()) + "".join(
            f"{one.message}{one.exc_text}" for one in caplog.records
        )
        held = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    held += (tmp_path / "b.db").read_bytes()
    for secret in SECRETS:
        assert secret not in said
        assert secret.encode() not in held


def refused(bursar: Bursar, **options: Any) -> str:
    """The text and the fields of the refusals that these calls end in."""
    said = ""
    for _ in range(100):
        try:
            bursar.reserve("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=300, **options).settle(answer())
        except BursarError as error:
            said += f"{error!r} {error.fields}"
    return said


def test_what_is_asked_and_answered_is_not_kept(books: Bursar) -> None:
    with books.scope(run="r"):
        for given in (
            answer(),
            [answer()],
            {"choices": [{"message": {"content": ANSWER}}]},
            {"error": {"message": ANSWER}},
        ):
            books.reserve("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=50).settle(given)
        said = refused(books)
    assert said
    assert not any(secret in said for secret in SECRETS)
    assert {one.kind for one in books.records()} >= {"settlement", "release", "refusal"}


def test_an_answer_that_cannot_be_read_is_not_quoted(books: Bursar) -> None:
    for number, given in enumerate(
        (ANSWER, f"data: {ANSWER}\n\n", ANSWER.encode(), {"usage": ANSWER}, {"usage": {"prompt_tokens": {}}}, [ANSWER])
    ):
        with pytest.raises(BursarError) as caught:
            Usage.from_response("openai", given)
        assert ANSWER not in f"{caught.value!r}{caught.value.fields}"
        with books.scope(run=f"r{number}"):  # in one run each further failure would be put off for longer
            books.reserve("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=5).settle(given)


def test_a_loop_is_told_without_what_it_is_about(books: Bursar) -> None:
    history = list(MESSAGES)
    with books.scope(run="r"):
        for number in range(8):
            call = {
                "id": f"c{number}",
                "type": "function",
                "function": {"name": "pay", "arguments": f'{{"to": "{ARGUMENT}"}}'},
            }
            message = {"role": "assistant", "content": ANSWER, "tool_calls": [call]}
            with contextlib.suppress(Stopped, BudgetExceeded):
                reservation = books.reserve("openai", "gpt-4o-mini", messages=history, max_output_tokens=5)
                reservation.settle(answer(choices=[{"index": 0, "finish_reason": "tool_calls", "message": message}]))
                with books.tool("pay", arguments={"to": ARGUMENT}):
                    pass
            history = [*history, message, {"role": "tool", "tool_call_id": f"c{number}", "content": ARGUMENT}]
    assert any(alert.kind == "detector" for alert, _ in books.store.alerts())


def test_a_failing_call_is_booked_without_its_key(books: Bursar) -> None:
    """Providers quote the key and the request in their errors; the record names the error's kind alone."""
    said = {
        "error": {"message": f"Incorrect API key provided: {KEY}. You sent {PROMPT}.", "type": "invalid_request_error"}
    }
    routes = {f"POST /{status}/chat/completions": Canned(said, status=status) for status in (401, 400, 429, 500)}
    routes["POST /200/chat/completions"] = Canned(
        answer(), headers={"x-ratelimit-remaining-tokens": "7", "set-cookie": KEY}
    )
    with CannedProvider(routes) as provider, books.scope(run="r"):
        for status in (401, 400, 429, 500, 200):
            client = openai.OpenAI(api_key=KEY, base_url=f"{provider.url}/{status}", max_retries=0)
            for use in (client, books.wrap(client, provider="openai")):
                ends = contextlib.nullcontext() if status == 200 else pytest.raises(openai.OpenAIError)
                with books.scope(run=f"r-{status}-{use is client}"), ends:
                    if use is not client:
                        use.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_completion_tokens=9)
                        continue
                    with books.call("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=9) as call:
                        call.settle(client.chat.completions.create(model="gpt-4o", messages=MESSAGES))
    assert {one.outcome for one in books.records()} == {"failed", "completed"}


def test_no_repr_shows_a_key(books: Bursar) -> None:
    operator = Operator(books.store)
    key = operator.appoint()
    assert key.text not in f"{key!r}{key}{vars(operator)!r}{Operator(books.store, key)!r}"
    with pytest.raises(BursarError) as caught:
        Operator(books.store, key.text[:-9])
    assert key.text[20:-9] not in f"{caught.value!r}{caught.value.fields}"
