"""Budgets that ask: the graph that makes the call is paused by LangGraph's own interrupt; resumed, it tries the call again."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bursar.errors import ApprovalRequired

if TYPE_CHECKING:
    from bursar import Reservation

_lock = threading.Lock()


def reserve(block: Callable[[], Any]) -> Reservation:
    """What a block of `Bursar.call` or `.tool` reserves on entering.

    Raises GraphInterrupt where it asks within a graph that can be resumed, else what the block raises.
    """
    while True:
        try:
            return block().__enter__()  # type: ignore[no-any-return]
        except ApprovalRequired as error:
            _pause(error)


async def areserve(block: Callable[[], Any]) -> Reservation:
    """As `reserve`, for async callers."""
    while True:
        try:
            return await block().__aenter__()  # type: ignore[no-any-return]
        except ApprovalRequired as error:
            _pause(error)


def _pause(error: ApprovalRequired) -> None:
    """Pause the graph until somebody resumes it.

    Returns where it is being resumed already. What it is resumed with does not count: the budget asks the operator, not the
    graph's caller. So every value given is used up once, and then the graph is paused again.
    """
    if not _can_pause():
        raise error
    from langgraph.types import interrupt

    question = {
        "bursar": "approval",
        "id": error.id,
        "budget": error.budget,
        "scope": error.scope,
        "unit": error.unit,
        "limit": str(error.limit),
        "spent": str(error.spent),
        "message": str(error),
    }
    with _lock:  # parallel calls of one node: `interrupt` counts, then takes what the graph was resumed with
        interrupt(question)


def _can_pause() -> bool:
    """Whether the call is made in a graph that keeps checkpoints. `interrupt` asks the same of the same configuration."""
    if "langgraph.pregel" not in sys.modules:
        return False
    from langgraph.config import get_config

    try:
        configurable: dict[str, Any] = get_config()["configurable"]
    except (RuntimeError, KeyError):
        return False  # no graph around the call
    return bool(configurable.get("__pregel_checkpointer")) and "__pregel_scratchpad" in configurable


class _NoErrors(logging.Filter):
    """LangChain logs all that a handler raises as its error. A request that comes again and a graph that pauses are none."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        return not (isinstance(args, tuple) and args and str(args[-1]).startswith(("AskAgain(", "GraphInterrupt(")))


logging.getLogger("langchain_core.callbacks.manager").addFilter(_NoErrors())
