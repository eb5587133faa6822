"""Alerts: who is told of what budgets do, and the delivery that loses none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar.alerts.alert import Alert, Outbox
    from bursar.alerts.deliverer import Deliverer
    from bursar.alerts.message import Message
    from bursar.alerts.routes import Alerts, Route
    from bursar.alerts.sinks import Apprise, Log, Sink, Undelivered, Webhook

__all__ = [
    "Alerts",
    "Route",
    "Log",
    "Webhook",
    "Apprise",
    "Sink",
    "Message",
    "Alert",
    "Undelivered",
    "Deliverer",
    "Outbox",
]

# public name -> the module that holds it; it loads when the name is first used
_HOMES = {
    "Alerts": "routes",
    "Route": "routes",
    "Log": "sinks",
    "Webhook": "sinks",
    "Apprise": "sinks",
    "Sink": "sinks",
    "Undelivered": "sinks",
    "Message": "message",
    "Alert": "alert",
    "Outbox": "alert",
    "Deliverer": "deliverer",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bursar.alerts' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bursar.alerts.{home}"), name)
    return value
