"""Bursar's errors as CrewAI meets them: classes that none of its retries and error handlers swallows."""

from __future__ import annotations

from functools import cache
from typing import Any

from crewai.hooks import HookAborted

from bursar import errors
from bursar.errors import BudgetExceeded, BursarError

# CrewAI retries what sounds like throttling, which a refusal may (a budget can be named "rate limit"), unless it has this code.
_NOT_THROTTLING = "ServiceQuotaExceededException"


class CrewBudgetExceeded(BudgetExceeded, HookAborted):
    """A budget refused the call; nothing was sent. The fields are those of `bursar.BudgetExceeded`.

    A HookAborted, which CrewAI hands to the caller of `kickoff` as it is: it neither repeats the task nor tells the model.
    Where the core raises `ApprovalRequired` or `Stopped`, a subclass is raised that is also one of these.
    """

    code = _NOT_THROTTLING
    source = "bursar"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.reason = message


def crew_error(error: BursarError) -> BursarError:
    """The same error in a class that CrewAI lets through."""
    if isinstance(error, HookAborted):
        return error
    kind = CrewBudgetExceeded if type(error) is BudgetExceeded else _crew_kind(type(error).__name__)
    return kind(str(error), **error.fields)


@cache
def _crew_kind(name: str) -> type[BursarError]:
    kind: type[BursarError] = getattr(errors, name)
    passing = CrewBudgetExceeded if issubclass(kind, BudgetExceeded) else HookAborted

    def __init__(self: Any, message: str, **fields: Any) -> None:
        kind.__init__(self, message, **fields)
        self.reason = message

    names = {
        "__module__": __name__,
        "__doc__": kind.__doc__,
        "__init__": __init__,
        "code": _NOT_THROTTLING,
        "source": "bursar",
    }
    return type(f"Crew{name}", (kind, passing), names)


def __getattr__(name: str) -> Any:
    kind = getattr(errors, name.removeprefix("Crew"), None)  # by this name it is found when it is unpickled
    if not name.startswith("Crew") or not isinstance(kind, type) or not issubclass(kind, BursarError):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _crew_kind(kind.__name__)
