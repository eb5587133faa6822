"""What an alert is about: its kind, its budget, and whose that is."""

from __future__ import annotations

from bursar.commands import Alert

KINDS = ("threshold", "approval", "frozen", "detector", "policy", "resolved")


def budget_of(alert: Alert) -> str:
    """The budget's name, or nothing."""
    return str(alert.facts.get("budget") or "")


def owner_of(alert: Alert) -> str:
    """Who is responsible for that budget, or nothing."""
    return str(alert.facts.get("owner") or "")


def topic_of(alert: Alert) -> str:
    """The kind that it is about: for what is resolved the kind that is over (`was`), or nothing where that is not said."""
    return str(alert.facts.get("was") or "") if alert.kind == "resolved" else alert.kind
