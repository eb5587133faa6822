"""Sinks: where messages go. The log, a function, signed webhooks, and every service that Apprise knows."""

from __future__ import annotations

import base64
import logging
import os
import traceback
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote, urlsplit

from bursar.alerts.message import Message
from bursar.alerts.quiet import quiet
from bursar.errors import BursarError, PolicyError
from bursar.records import instant

log = logging.getLogger("bursar.alerts")

OWNER = "{owner}"
GROUP = "{group}"
TIMEOUT_S = 15.0  # the least that the Standard Webhooks specification recommends
MIN_SECRET_BYTES = 24
MAX_RETRY_AFTER_S = 3_600.0


class Undelivered(BursarError):
    """A message was not taken; it will be sent again. The text holds no address, token or answer of the receiver.

    Fields: `retry_after_s` (the receiver's wish, or None), `gone` (the receiver wants nothing more, ever).
    """

    retry_after_s: float | None
    gone: bool

    def __init__(self, message: str, *, retry_after_s: float | None = None, gone: bool = False) -> None:
        super().__init__(message, retry_after_s=retry_after_s, gone=gone)


@runtime_checkable
class Sink(Protocol):
    """Takes messages. `send` returns once the receiver has the message, and raises when it may not have it.

    It is called from one thread at a time, and may take its time: no call and no other sink waits for it.
    `name` stands in the log: it must hold no secret.
    """

    name: str

    def send(self, message: Message, now_us: int) -> None:
        """Deliver; `now_us` is the time of this attempt."""
        ...


class Log:
    """Writes to the logger `bursar.alerts`, as warnings; what is over, as information."""

    name = "log"

    def send(self, message: Message, now_us: int) -> None:
        level = logging.INFO if message.kind == "resolved" else logging.WARNING
        log.log(level, "%s\n%s", message.title, message.text)

    def __repr__(self) -> str:
        return "Log()"


class Function:
    """Calls a function of yours with the message."""

    def __init__(self, function: Callable[[Message], object]) -> None:
        self._function = function
        self.name = f"function {getattr(function, '__qualname__', type(function).__name__)}"

    def send(self, message: Message, now_us: int) -> None:
        self._function(message)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Webhook:
    """Posts JSON, signed by the Standard Webhooks specification 1.0.0 (symmetric, `v1`), to an address of yours.

    `secret`: `whsec_` and at least 24 random bytes in base64; while it is being changed, both, with a space between. The
    address may hold `{owner}`. Needs `bursar[alerts]`. Raises PolicyError.
    """

    def __init__(self, url: str, secret: str) -> None:
        self._httpx = _library("httpx")
        self._tls = self._httpx.create_ssl_context()  # made once: it reads every root certificate
        self._keys = [_key(one) for one in secret.split()]
        if not self._keys:
            raise _bad_secret()
        try:
            parts = urlsplit(url)
            host, usable = parts.hostname, parts.scheme in ("https", "http")
        except ValueError:
            host, usable = None, False
        if url != OWNER and not (host and usable):
            raise PolicyError(
                "A webhook's address is not usable. Write it like https://example.com/hook.", key="webhook"
            )
        self._url = url
        self.name = f"webhook {host or OWNER}"

    def send(self, message: Message, now_us: int) -> None:
        body = message.body()
        at = instant(now_us)
        headers = {
            "content-type": "application/json",
            "user-agent": "bursar",
            "webhook-id": message.id,
            "webhook-timestamp": str(now_us // 1_000_000),
            "webhook-signature": " ".join(key.sign(message.id, at, body) for key in self._keys),
        }
        httpx = self._httpx
        with quiet():
            try:
                with (
                    httpx.Client(verify=self._tls, timeout=TIMEOUT_S, follow_redirects=False) as client,
                    client.stream("POST", _addressed(self._url, message), content=body, headers=headers) as answer,
                ):
                    status, wish = answer.status_code, answer.headers.get("retry-after")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                # Its text may hold the address; its class says what happened.
                raise Undelivered(f"{self.name}: {type(error).__name__}") from None
        if not 200 <= status < 300:
            raise Undelivered(
                f"{self.name} answered {status}", retry_after_s=_retry_after_s(wish, at), gone=status == 410
            )

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Apprise:
    """Hands messages to one of the services that Apprise knows: Slack, Teams, Discord, mail, PagerDuty and many more.

    `url` is Apprise's own (`slack://...`), and may hold `{owner}` and `{group}` (`Message.group`). Needs `bursar[alerts]`.
    Raises PolicyError.
    """

    def __init__(self, url: str) -> None:
        self._library = _library("apprise")
        self._url = url
        self._service(url.replace(OWNER, "owner"))  # what is wrong shows now, not at the first alert
        self.name = f"apprise {url.partition(':')[0].lower()}"

    def send(self, message: Message, now_us: int) -> None:
        kinds = self._library.NotifyType
        urgent = kinds.FAILURE if message.kind in ("frozen", "detector") else kinds.WARNING
        kind = kinds.SUCCESS if message.kind == "resolved" else urgent
        with quiet():
            service = self._service(_addressed(self._url, message))
            taken = service.notify(body=message.text, title=message.title, notify_type=kind, body_format="text")
        if not taken:
            raise Undelivered(f"{self.name}: not taken")

    def _service(self, url: str) -> Any:
        with quiet():
            # Without a time limit of its own the library stays on this thread; its sockets have theirs. No pictures: they
            # would be fetched from a third party.
            asset = self._library.AppriseAsset(
                app_id="Bursar", app_desc="Bursar", app_url="", image_url_mask="", image_url_logo="", service_timeout=0
            )
            service = self._library.Apprise(asset=asset)
            if not service.add(url) or len(service) != 1:
                raise PolicyError(
                    "An alert's url is none that Apprise knows. Look up how its service writes it in Apprise's own pages.",
                    key="url",
                )
        return service

    def holds_secret(self) -> bool:
        """Whether Apprise would hide a part of this url."""
        with quiet():
            return any(one.url(privacy=True) != one.url(privacy=False) for one in self._service(self._url))

    def __repr__(self) -> str:
        return f"<{self.name}>"


def place(error: BaseException) -> str:
    """What failed and where, without the error's text, which may hold a secret."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}"


def _addressed(url: str, message: Message) -> str:
    """The address with the owner, and what the message is about, in their places."""
    url = url.replace(GROUP, message.group)
    if OWNER not in url:
        return url
    owner = message.owner.removeprefix("mailto:")
    if not owner:
        raise Undelivered("the address asks for an owner, and the budget has none")
    return owner if url == OWNER else url.replace(OWNER, quote(owner, safe=""))


def _key(secret: str) -> Any:
    encoded = secret.removeprefix("whsec_").rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        raise _bad_secret() from None
    if len(key) < MIN_SECRET_BYTES:
        raise _bad_secret()
    return _library("standardwebhooks").Webhook(key)


def _bad_secret() -> PolicyError:
    return PolicyError(
        f"A webhook's secret is not base64 of at least {MIN_SECRET_BYTES} bytes. Make one: `openssl rand -base64 32`.",
        key="secret_env",
    )


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise PolicyError(
            f'Alerts to other services need {name}. Install it: `pip install "bursar[alerts]"`.', library=name
        ) from None


def _retry_after_s(wish: str | None, now: datetime) -> float | None:
    """The header in seconds, which it holds as a number or as a date; None where it says nothing usable."""
    if not wish:
        return None
    try:
        seconds = (
            float(wish) if wish.isascii() and wish.isdigit() else (parsedate_to_datetime(wish) - now).total_seconds()
        )
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
