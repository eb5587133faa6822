"""Messages: alerts of one kind and budget, told together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bursar.alerts.alert import Alert
from bursar.money import dollar_text
from bursar.records import instant

MAX_ALERTS = 50  # of one message: a webhook's body stays near the 20 kB that its specification recommends
MAX_LINES = 10
MAX_TEXT = 300
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Names come from agents: no chat may take one for a call to everybody.
_MENTION = re.compile(r"@(?=everyone|here|channel|all\b)|<(?=[!@#])", re.IGNORECASE)
_HEADLINES = {
    "threshold": "a threshold is crossed",
    "refused": "calls are refused",
    "frozen": "frozen",
    "approval": "an approval is asked for",
    "detector": "runaway behaviour is detected",
    "shadow": "calls would have been refused",
    "policy": "the policy has changed",
}
_AMOUNTS = ("limit", "spent", "reserved", "available", "asked")


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
        return hashlib.sha256("\n".join(alert.id for alert in self.alerts).encode()).hexdigest()[:32]

    @property
    def kind(self) -> str:
        return self.alerts[0].kind

    @property
    def budget(self) -> str:
        return self.alerts[0].budget

    @property
    def owner(self) -> str:
        return self.alerts[0].owner

    @property
    def title(self) -> str:
        """One line, for people."""
        first = self.alerts[0]
        said = _HEADLINES.get(first.topic, _plain(first.topic))
        said = f"over: {said}" if first.kind == "resolved" else said
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
                    {"id": one.id, "at": instant(one.at_us).isoformat(), "facts": _bounded(one.facts)}
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
    facts = dict(_bounded(alert.facts))
    unit = facts.pop("unit", None)
    for left_out in ("budget", "was"):
        facts.pop(left_out, None)
    said = []
    if isinstance(facts.get("mark"), int):
        said.append(f"{facts.pop('mark')} %")
    for name, value in facts.items():
        if value in (None, "", {}, []):
            continue
        if name in _AMOUNTS and isinstance(value, int):
            value = f"{dollar_text(value)} USD" if unit == "USD" else f"{value} {unit or ''}".rstrip()
        elif isinstance(value, Mapping):
            value = " ".join(f"{key}={one}" for key, one in value.items())
        said.append(f"{_plain(name)} {_plain(value)}")
    return f"{instant(alert.at_us):%Y-%m-%d %H:%M:%S} UTC  {', '.join(said)}".rstrip()


def _plain(value: object) -> str:
    """Text in one line that means nothing to a chat or a terminal."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(value)[:MAX_TEXT])
    return _MENTION.sub(lambda found: f"{found[0]}\u200b", text)


def _bounded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with long texts cut and the owner's address closed."""
    cut = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in list(facts.items())[:50]}
    if "owner" in cut:
        cut["owner"] = public(str(cut["owner"] or "")) or None
    return cut
