"""Messages: alerts of one kind and budget, told together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

from bursar.alerts.alert import budget_of, owner_of, topic_of
from bursar.commands import Alert
from bursar.errors import shown
from bursar.money import dollar_text
from bursar.records import instant

MAX_ALERTS = 50  # of one message: a webhook's body stays near the 20 kB that its specification recommends
MAX_LINES = 10
MAX_TEXT = 300
MAX_FACT = 2_000
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Names come from agents: no chat may take one for a call to everybody, for a link that says where it does not lead, or for HTML.
_MENTION = re.compile(r"@(?=everyone|here|channel|all\b)|<(?=[!@#/a-z])|\](?=\()", re.IGNORECASE)
_HEADLINES = {
    "threshold": "a threshold is crossed",
    "approval": "an approval is asked for",
    "frozen": "stopped",
    "detector": "runaway behaviour",
    "policy": "a policy file cannot be taken",
}
_AMOUNTS = ("limit", "spent", "reserved", "available", "asked")
# Of use to programs, not to people.
_UNTOLD = {"budget", "was", "account", "call", "mark", "at", "unit", "enforce", "state", "at_us"}


@dataclass(frozen=True, slots=True)
class Message:
    """What a sink is given: one or more alerts of the same kind and budget, oldest first.

    A message that is sent again has the same content and `id`, so that receivers can tell.
    """

    alerts: tuple[Alert, ...]

    @property
    def id(self) -> str:
        """The alert's own id, where it is alone and a header can carry it; else one made of all ids."""
        if len(self.alerts) == 1 and _SAFE_ID.fullmatch(self.alerts[0].id):
            return self.alerts[0].id
        return hashlib.sha256("\n".join(alert.id for alert in self.alerts).encode("utf-8", "replace")).hexdigest()[:32]

    @property
    def kind(self) -> str:
        return self.alerts[0].kind

    @property
    def budget(self) -> str:
        return budget_of(self.alerts[0])

    @property
    def owner(self) -> str:
        return owner_of(self.alerts[0])

    @property
    def group(self) -> str:
        """The same for what is about one kind and budget, its end included: pagers open and close incidents by it."""
        said = f"{topic_of(self.alerts[0])}\n{self.budget}"
        return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]

    @property
    def title(self) -> str:
        """One line, for people."""
        topic = topic_of(self.alerts[0])
        said = _HEADLINES.get(topic, _plain(topic))
        said = f"over: {said}".removesuffix(": ") if self.kind == "resolved" else said
        times = f" ({len(self.alerts)} times)" if len(self.alerts) > 1 else ""
        return f"Bursar: {_plain(self.budget)}: {said}{times}" if self.budget else f"Bursar: {said}{times}"

    @property
    def text(self) -> str:
        """Several lines, for people: the first alerts and the last, each with its time and facts."""
        shown = [*self.alerts] if len(self.alerts) <= MAX_LINES else [*self.alerts[: MAX_LINES - 1], self.alerts[-1]]
        lines = [_line(alert) for alert in shown]
        if len(shown) < len(self.alerts):
            lines.insert(-1, f"... {len(self.alerts) - len(shown)} more ...")
        return "\n".join(lines)

    def payload(self) -> dict[str, Any]:
        """The whole as plain JSON, for programs: `type`, `timestamp` (of the first alert) and `data`."""
        first, last = (instant(alert.at_us).isoformat() for alert in (self.alerts[0], self.alerts[-1]))
        return {
            "type": f"bursar.alert.{self.kind}",
            "timestamp": first,
            "data": {
                "budget": self.budget or None,
                "count": len(self.alerts),
                "first": first,
                "last": last,
                "alerts": [
                    {"id": one.id, "at": instant(one.at_us).isoformat(), "facts": _bounded(_closed(one))}
                    for one in self.alerts
                ],
            },
        }

    def body(self) -> str:
        """The payload as text, the same whenever it is made."""
        return json.dumps(self.payload(), sort_keys=True, separators=(",", ":"))


def public(owner: str) -> str:
    """An owner as others may see it: an address with a scheme may hold a token anywhere behind it."""
    scheme, found, _ = owner.partition("://")
    return f"{scheme}://..." if found else owner


def _line(alert: Alert) -> str:
    facts = _closed(alert)
    said = []
    at, limit = facts.get("at"), facts.get("limit")
    if is_amount(at) and is_amount(limit) and limit > 0:
        said.append(f"{at * 100 // limit} %")
    if facts.get("enforce") is False:
        said.append("in shadow mode")
    unit = _unit(facts)
    said += [
        f"{_plain(name)} {_shown(name, value, unit)}"
        for name, value in facts.items()
        if name not in _UNTOLD and value not in (None, "", "{}", {}, [])
    ]
    return f"{instant(alert.at_us):%Y-%m-%d %H:%M:%S} UTC  {', '.join(said)}".rstrip()


def _unit(facts: Mapping[str, Any]) -> str:
    """What the amounts count: it stands in the facts, or in the account's key."""
    try:
        return _plain(facts.get("unit") or json.loads(facts["account"])[1])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return ""


def is_amount(value: Any) -> TypeGuard[int]:
    """Whether it is an integer that an account can hold: whoever may write to the store puts what they like into an alert."""
    return isinstance(value, int) and abs(value) < 2**63


def _shown(name: str, value: Any, unit: str) -> str:
    if is_amount(value) and name in _AMOUNTS:
        return f"{dollar_text(value)} USD" if unit == "USD" else f"{value} {unit}".rstrip()
    if is_amount(value) and name.endswith("_us"):
        return f"{instant(value):%Y-%m-%d %H:%M:%S} UTC"
    if name == "scope" and isinstance(value, str):
        with suppress(ValueError, RecursionError):  # shown as it is
            value = json.loads(value)
    if isinstance(value, Mapping):
        return _plain(" ".join(f"{key}={_text(one)}" for key, one in value.items()))
    return _plain(value)


def _plain(value: object) -> str:
    """Text in one line that means nothing to a chat or a terminal."""
    text = "".join(sign if sign.isprintable() else " " for sign in _text(value)[:MAX_TEXT])
    return _MENTION.sub(lambda found: f"{found[0]}\u200b", text)


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _closed(alert: Alert) -> dict[str, Any]:
    """The facts with the owner's address closed, wherever a text quotes it."""
    owner = owner_of(alert)
    shown = public(owner)
    if shown == owner:
        return alert.facts
    return {
        name: value.replace(owner, shown) if isinstance(value, str) else value for name, value in alert.facts.items()
    }


def _bounded(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name)[:MAX_FACT]: value[:MAX_FACT] if isinstance(value, str) else _sendable(value)
        for name, value in list(facts.items())[:50]
    }


def _sendable(value: Any) -> Any:
    """The value, where it is JSON of a size that a receiver takes; else that it is not."""
    with suppress(ValueError, RecursionError):
        if len(json.dumps(value, allow_nan=False)) <= MAX_FACT:
            return value
    return "cannot be told"
