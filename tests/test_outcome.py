"""Only a clear refusal before generation is free: which errors say so."""

from __future__ import annotations

import httpx
import pytest

from bursar.outcome import surely_not_billed


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status_code = status


class ClientError(Exception):
    """As botocore's: the status stands in a dict."""

    def __init__(self, status: int) -> None:
        super().__init__("botocore")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def wrapped(error: Exception) -> Exception:
    """As an SDK raises it: its own error from the cause."""
    try:
        raise RuntimeError("Connection error.") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        *map(Refused, (400, 401, 403, 404, 422, 429)),
        ClientError(400),
        ConnectionRefusedError(),
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("no answer"),
        wrapped(httpx.ConnectError("refused")),
        wrapped(Refused(429)),
    ],
    ids=repr,
)
def test_a_clear_refusal_is_free(error: Exception) -> None:
    assert surely_not_billed(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(Refused, (408, 409, 499, 500, 502, 503, 529)),
        ClientError(500),
        httpx.ReadTimeout("no answer in time"),
        httpx.RemoteProtocolError("cut"),
        TimeoutError(),
        KeyboardInterrupt(),
        ValueError("unparsable"),
        wrapped(httpx.ReadTimeout("no answer in time")),
        wrapped(Refused(500)),
    ],
    ids=repr,
)
def test_everything_else_may_have_been_billed(error: BaseException) -> None:
    assert not surely_not_billed(error)


def test_an_error_that_was_being_handled_says_nothing_of_the_call() -> None:
    """A retry inside `except` has the first try's refusal as its context, and may time out all the same."""
    try:
        try:
            raise Refused(429)
        except Refused:
            raise TimeoutError  # noqa: B904 - that it is raised without `from` is the case
    except TimeoutError as error:
        caught = error
    assert isinstance(caught.__context__, Refused)
    assert not surely_not_billed(caught)
