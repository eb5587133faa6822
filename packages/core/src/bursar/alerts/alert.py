"""What an alert is about: its kind, its budget, and whose that is."""

from __future__ import annotations

from bursar.commands import Alert

KINDS = ("threshold", "approval", "frozen", "detector", "policy", "resolved")


def budget_of(alert: Alert) -> str:
    """The budget's name, or nothing."""
    return _text(alert.facts.get("budget"))


def owner_of(alert: Alert) -> str:
    """Who is responsible for that budget, or nothing."""
    return _text(alert.facts.get("owner"))


def topic_of(alert: Alert) -> str:
    """The kind that it is about: for what is resolved the kind that is over (`was`), or nothing where that is not said."""
    return _text(alert.facts.get("was")) if alert.kind == "resolved" else alert.kind


def _text(fact: object) -> str:
    return fact if isinstance(fact, str) else ""
