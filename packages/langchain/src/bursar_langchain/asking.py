"""Budgets that ask: the graph that makes the call is paused as by LangGraph's own interrupt; resumed, it tries the call again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bursar.errors import ApprovalRequired

if TYPE_CHECKING:
    from bursar import Reservation

_PAUSED = "paused by bursar"
# LangGraph's names for what `interrupt` finds in a node's configuration.
_CHECKPOINTER, _SCRATCHPAD, _SEND, _RESUME = (
    "__pregel_checkpointer",
    "__pregel_scratchpad",
    "__pregel_send",
    "__resume__",
)


def reserve(block: Callable[[], Any]) -> Reservation:
    """What a block of `Bursar.call` or `.tool` reserves on entering.

    Raises GraphInterrupt where it asks within a graph that keeps checkpoints, else what the block raises.
    """
    _take_answer()
    try:
        return block().__enter__()  # type: ignore[no-any-return]
    except ApprovalRequired as error:
        _pause(error)
        raise


async def areserve(block: Callable[[], Any]) -> Reservation:
    """As `reserve`, for async callers."""
    _take_answer()
    try:
        return await block().__aenter__()  # type: ignore[no-any-return]
    except ApprovalRequired as error:
        _pause(error)
        raise


def _pause(error: ApprovalRequired) -> None:
    """Pause the graph that makes the call, where one does that keeps checkpoints."""
    node = _node()
    if node is None:
        return
    from langgraph.errors import GraphInterrupt
    from langgraph.types import Interrupt

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
    # Kept with the checkpoint, after the answers that the node's own interrupts have had: whose pause this is.
    node[_SEND]([(_RESUME, [*node[_SCRATCHPAD].resume, _PAUSED])])
    raise GraphInterrupt((Interrupt.from_ns(question, ns=node["checkpoint_ns"]),)) from error


def _take_answer() -> None:
    """Use up what a graph that was paused here is resumed with.

    It does not count: the budget asks the operator, not the graph's caller. Left there, the next interrupt of the node, or
    of a graph inside of it, would take it for its own answer, and run what nobody has allowed.
    """
    node = _node()
    if node is None or _PAUSED not in node[_SCRATCHPAD].resume:
        return
    node[_SCRATCHPAD].get_null_resume(True)
    given = node[_SCRATCHPAD].resume
    del given[given.index(_PAUSED) :]  # with what was given by the interrupt's id, which stands after it
    node[_SEND]([(_RESUME, list(given))])


def _node() -> dict[str, Any] | None:
    """The configuration of the node that makes the call, in a graph that keeps checkpoints."""
    if "langgraph.pregel" not in sys.modules:
        return None
    from langgraph.config import get_config

    try:
        found: dict[str, Any] = get_config().get("configurable") or {}
    except RuntimeError:
        return None  # no graph around the call
    return found if found.get(_CHECKPOINTER) is not None and _SCRATCHPAD in found else None


class _NoErrors(logging.Filter):
    """LangChain logs all that a handler raises as its error. A request that comes again and a graph that pauses are none."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        return not (isinstance(args, tuple) and args and str(args[-1]).startswith(("AskAgain(", "GraphInterrupt(")))


logging.getLogger("langchain_core.callbacks.manager").addFilter(_NoErrors())
