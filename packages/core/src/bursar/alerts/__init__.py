"""Alerts: who is told of what budgets do, and the delivery that loses none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar.alerts.deliverer import Deliverer
    from bursar.alerts.message import Message
    from bursar.alerts.routes import Alerts, Route
    from bursar.alerts.sinks import Apprise, Log, Sink, Undelivered, Webhook
    from bursar.commands import Alert

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
]

# public name -> the module that holds it; it loads when the name is first used
_HOMES = {
    "Alerts": "alerts.routes",
    "Route": "alerts.routes",
    "Log": "alerts.sinks",
    "Webhook": "alerts.sinks",
    "Apprise": "alerts.sinks",
    "Sink": "alerts.sinks",
    "Undelivered": "alerts.sinks",
    "Message": "alerts.message",
    "Alert": "commands",
    "Deliverer": "alerts.deliverer",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bursar.alerts' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bursar.{home}"), name)
    return value
