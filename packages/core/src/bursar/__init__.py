"""Bursar: in-process budgets for AI agents. Reserve before the call, settle to the real cost, explain every cent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar.budget import Budget, Threshold
    from bursar.errors import (
        ApprovalRequired,
        BudgetExceeded,
        BursarError,
        IdempotencyConflict,
        InvalidInput,
        OperatorRequired,
        PolicyError,
        ReservationEnded,
        Stopped,
        StoreError,
        UnboundedEstimate,
        UnknownPrice,
        UnreadableAnswer,
    )
    from bursar.facade import Bursar
    from bursar.operator import Operator, Question
    from bursar.prices import Override, PriceBook
    from bursar.records import BudgetStatus, UsageRecord
    from bursar.reservation import Reservation
    from bursar.signing import OperatorKey
    from bursar.usage import Usage

__version__ = "0.1.0"

# public name -> the module that holds it; it loads when the name is first used
_HOMES = {
    "Bursar": "facade",
    "Budget": "budget",
    "Threshold": "budget",
    "Operator": "operator",
    "OperatorKey": "signing",
    "Question": "operator",
    "Usage": "usage",
    "UsageRecord": "records",
    "BudgetStatus": "records",
    "Reservation": "reservation",
    "PriceBook": "prices",
    "Override": "prices",
    "BursarError": "errors",
    "BudgetExceeded": "errors",
    "ApprovalRequired": "errors",
    "Stopped": "errors",
    "OperatorRequired": "errors",
    "InvalidInput": "errors",
    "PolicyError": "errors",
    "UnknownPrice": "errors",
    "UnreadableAnswer": "errors",
    "UnboundedEstimate": "errors",
    "StoreError": "errors",
    "IdempotencyConflict": "errors",
    "ReservationEnded": "errors",
}

__all__ = [
    "Bursar",
    "Budget",
    "Threshold",
    "Operator",
    "OperatorKey",
    "Question",
    "Usage",
    "UsageRecord",
    "BudgetStatus",
    "Reservation",
    "PriceBook",
    "Override",
    "BursarError",
    "BudgetExceeded",
    "ApprovalRequired",
    "Stopped",
    "OperatorRequired",
    "InvalidInput",
    "PolicyError",
    "UnknownPrice",
    "UnreadableAnswer",
    "UnboundedEstimate",
    "StoreError",
    "IdempotencyConflict",
    "ReservationEnded",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bursar' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bursar.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
