"""The refusal as LangChain meets it: one class that no retry, fallback or tool error handler of the framework swallows."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from bursar.errors import BudgetExceeded

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
    once langgraph is loaded also a GraphBubbleUp, which its tool nodes and LangChain's middlewares let through.
    """

    is_retryable = False


def langchain_error(error: BudgetExceeded) -> LangChainBudgetExceeded:
    """The same refusal in the class that the framework lets through."""
    if isinstance(error, LangChainBudgetExceeded):
        return error
    kind = _in_graphs() if "langgraph" in sys.modules else LangChainBudgetExceeded
    return kind(str(error), **error.fields)


@cache
def _in_graphs() -> type[LangChainBudgetExceeded]:
    # Importing langgraph takes a quarter of a second, so it is not loaded for those who do not use it.
    from langgraph.errors import GraphBubbleUp

    names = {"__module__": __name__, "__doc__": LangChainBudgetExceeded.__doc__}
    return type("GraphBudgetExceeded", (LangChainBudgetExceeded, GraphBubbleUp), names)


def __getattr__(name: str) -> Any:
    if name != "GraphBudgetExceeded":  # by this name it is found when it is unpickled
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _in_graphs()
