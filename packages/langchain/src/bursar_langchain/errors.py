"""Refusals as LangChain meets them: classes that no retry, fallback or tool error handler of the framework swallows."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from bursar.errors import ApprovalRequired, BudgetExceeded, Stopped

if TYPE_CHECKING:

    class _ModelError(Exception):
        """Stands for langchain_core's ModelError, which releases before 1.6 do not have."""

else:
    try:
        from langchain_core.exceptions import ModelError as _ModelError
    except ImportError:  # langchain-core before 1.6
        _ModelError = Exception


class LangChainBudgetExceeded(BudgetExceeded, _ModelError):
    """A budget refused the call; nothing was sent. The fields are those of `bursar.BudgetExceeded`.

    A RuntimeError, which LangGraph's retry policy leaves alone; a ModelError that says that retrying is of no use; and
    once langgraph is loaded also a GraphBubbleUp, which its tool nodes and LangChain's middlewares let through. Where the
    core raises `ApprovalRequired` or `Stopped`, it is one of these as well.
    """

    is_retryable = False


_KINDS = {kind.__name__: kind for kind in (BudgetExceeded, ApprovalRequired, Stopped)}


def langchain_error(error: BudgetExceeded) -> LangChainBudgetExceeded:
    """The same refusal in a class that the framework lets through."""
    if isinstance(error, LangChainBudgetExceeded):
        return error
    family = "Graph" if "langgraph" in sys.modules else "LangChain"
    return _class(family, type(error).__name__)(str(error), **error.fields)


@cache
def _class(family: str, name: str) -> type[LangChainBudgetExceeded]:
    bases: list[type] = [LangChainBudgetExceeded]
    if name != "BudgetExceeded":
        bases.append(_KINDS[name])
    elif family == "LangChain":
        return LangChainBudgetExceeded
    if family == "Graph":
        # Importing langgraph takes a quarter of a second, so it is not loaded for those who do not use it.
        from langgraph.errors import GraphBubbleUp

        bases.append(GraphBubbleUp)
    doc = _KINDS[name].__doc__ if name != "BudgetExceeded" else LangChainBudgetExceeded.__doc__
    return type(family + name, tuple(bases), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    for family in ("Graph", "LangChain"):  # by these names they are found when they are unpickled
        if name.startswith(family) and name.removeprefix(family) in _KINDS:
            return _class(family, name.removeprefix(family))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
