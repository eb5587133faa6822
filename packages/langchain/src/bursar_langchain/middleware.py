"""The middleware for `create_agent`: what a handler cannot do, because only a middleware may change a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import HumanMessage, ToolMessage
from langgraph.errors import GraphBubbleUp

from bursar.errors import BudgetExceeded
from bursar_langchain.gate import Gate, Slot, current_slot
from bursar_langchain.handler import BursarCallbackHandler
from bursar_langchain.hooks import active, hook

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from bursar import Bursar

    _Middleware = AgentMiddleware[Any, Any, Any]
else:
    _Middleware = AgentMiddleware  # its number of parameters changed within langchain 1

# What a model class calls the maximum output of one call, where it is not `max_tokens`.
_LIMIT_NAMES = {
    "ChatGoogleGenerativeAI": "max_output_tokens",
    "ChatVertexAI": "max_output_tokens",
    "ChatOllama": "num_predict",
}


class AskForLess(GraphBubbleUp):
    """The request has to come again, with a smaller answer. A GraphBubbleUp, so that no retry on the way catches it."""


class BursarMiddleware(_Middleware):
    """Budgets for an agent made by `create_agent`: `create_agent(model, tools, middleware=[BursarMiddleware(bursar)])`.

    Makes an answer's maximum smaller where the budget has no room for more, has streams state their usage, goes to
    `fallback` (a cheaper model) where the budget has no room for the first, and turns a tool that was refused into an error
    that the model reads. It brings its own handler: model calls and tools of this agent are held against the budgets
    without further ado. Put it first in the list. Raises LangChainBudgetExceeded where no model fits.
    """

    def __init__(self, bursar: Bursar, *, fallback: BaseChatModel | None = None, **tags: str) -> None:
        super().__init__()
        self._handler = BursarCallbackHandler(bursar, **tags)
        self._gate = Gate.of(bursar)
        self._fallback = fallback
        hook()

    # -- model calls ---------------------------------------------------------------------------------------------

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return self._call_model(request, handler)
        except BudgetExceeded:
            if self._fallback is None:
                raise
        return self._call_model(request.override(model=self._fallback), handler)

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            return await self._acall_model(request, handler)
        except BudgetExceeded:
            if self._fallback is None:
                raise
        return await self._acall_model(request.override(model=self._fallback), handler)

    def _call_model(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        request = _with_usage(request)
        with self._inside(request.state, clamps=True) as slot:
            try:
                return handler(request)
            except AskForLess:
                return handler(_smaller(request, slot))

    async def _acall_model(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        request = _with_usage(request)
        with self._inside(request.state, clamps=True) as slot:
            try:
                return await handler(request)
            except AskForLess:
                return await handler(_smaller(request, slot))

    @contextmanager
    def _inside(self, state: Any, *, clamps: bool) -> Iterator[Slot]:
        """With the handler active, and with what the calls inside leave open ended on leaving."""
        outer = current_slot.get()
        run = outer.run if outer is not None and outer.run else _turn(state)
        slot = Slot(AskForLess if clamps else None, run)
        handler_token, slot_token = active.set(self._handler), current_slot.set(slot)
        try:
            yield slot
        finally:
            current_slot.reset(slot_token)
            active.reset(handler_token)
            if slot.parked is not None:
                slot.parked.release("the request did not come again")
            for key in slot.keys:
                self._gate.end_soon(key)

    # -- tools ---------------------------------------------------------------------------------------------------

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        with self._inside(request.state, clamps=False):
            try:
                return handler(request)
            except BudgetExceeded as error:
                return _refusal(request, error)

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        with self._inside(request.state, clamps=False):
            try:
                return await handler(request)
            except BudgetExceeded as error:
                return _refusal(request, error)


def _with_usage(request: Any) -> Any:
    """The request with a model whose streams state their usage. Without it, a stream at another base URL states none."""
    model = request.model
    if "stream_usage" in type(model).model_fields and getattr(model, "stream_usage", None) is not True:
        return request.override(model=model.model_copy(update={"stream_usage": True}))
    return request


def _smaller(request: Any, slot: Slot) -> Any:
    name = _LIMIT_NAMES.get(type(request.model).__name__, "max_tokens")
    return request.override(model_settings={**request.model_settings, name: slot.max_output_tokens})


def _turn(state: Any) -> str | None:
    """The last message of a human: its id names the run wherever the thread is resumed."""
    messages = state.get("messages", ()) if isinstance(state, dict) else getattr(state, "messages", ())
    return next((message.id for message in reversed(messages) if isinstance(message, HumanMessage)), None)


def _refusal(request: Any, error: BudgetExceeded) -> ToolMessage:
    call = request.tool_call
    return ToolMessage(f"Not run: {error}", tool_call_id=call["id"], name=call["name"], status="error")
