"""Every error that Bursar raises: one root, few kinds, data in fields, the remedy in the last sentence."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

MAX_MESSAGE = 4_000


def shown(value: object) -> str:
    """A value that was refused, for an error's text: its beginning, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - Python writes out no integer of thousands of digits, and an object may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}..."


class BursarError(Exception):
    """The root of all errors of Bursar. `fields` holds the facts of the case as plain data.

    A message that quotes megabytes is cut in its middle: its last sentence is the remedy.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
        super().__init__(message)
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        # Facts read as attributes (`error.retry_after`); unknown names fail as usual.
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.__dict__.get("fields", {}))


def _rebuild(kind: type[BursarError], message: str, fields: dict[str, Any]) -> BursarError:
    return kind(message, **fields)


class BudgetExceeded(BursarError, RuntimeError):
    """A budget refused the call before anything was sent.

    Fields: `budget` (name), `scope` (dict of tags), `unit`, `limit`, `spent`, `reserved`, `available`, `asked` (Decimal, in the
    unit), `retry_after` (seconds, or None when waiting does not help), `max_output_tokens` (what would fit, or None).
    It is a RuntimeError, because the frameworks' own retries leave those alone.
    """

    budget: str
    scope: dict[str, str]
    unit: str
    limit: Decimal
    spent: Decimal
    reserved: Decimal
    available: Decimal
    asked: Decimal
    retry_after: float | None
    max_output_tokens: int | None


class ApprovalRequired(BudgetExceeded):
    """The budget asks before more is spent. Field `id`: for `bursar approve ID`; else those of BudgetExceeded."""

    id: str


class Stopped(BudgetExceeded):
    """The agent was stopped: by a switch (`bursar freeze`), a budget's `kill`, or a detector of runaway loops.

    Fields: `cause` (frozen, killed, or the detector's name), `why`; `budget` and the amounts where a budget did it.
    """

    cause: str
    why: str


class OperatorRequired(BursarError, PermissionError):
    """Only an operator may decide this: approve, raise, resume, release. Fields: `kind` and `name` of what was to be decided."""


class InvalidInput(BursarError, ValueError):
    """A value handed to Bursar is not usable; nothing was changed. Fields name the argument and the value."""


class UnknownPrice(BursarError, LookupError):
    """No price is known. Fields: `provider`, `model`, `nearest` (known models), and it is never taken for 0 (I11)."""


class UnreadableAnswer(BursarError, ValueError):
    """An answer's usage could not be read. Fields: `provider`, `reason` (`no_usage`, `not_billable` or `unreadable`)."""


class UnboundedEstimate(BursarError, RuntimeError):
    """A strict budget met a call whose cost has no upper bound. Fields: `reason`, `provider`, `model`."""


class PolicyError(BursarError, ValueError):
    """A policy is not valid. Fields: `file`, `line`, `key` where known."""


class StoreError(BursarError, RuntimeError):
    """The store could not do its work; nothing of the command was done.

    Field `fault`: `locked`, `full`, `readonly`, `damaged`, `newer`, `older`, `unreachable`, `loading`, `denied`, `evicts`,
    `clock`, `accounts`, `overflow`, `closed`.
    """


class IdempotencyConflict(BursarError, RuntimeError):
    """The id was used before with other content (I6). Field: `id`."""


class ReservationEnded(BursarError, RuntimeError):
    """The reservation has ended already, in another way (I5). Fields: `id`, `ended` (settled, released, expired)."""
