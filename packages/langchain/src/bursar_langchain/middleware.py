"""The middleware for `create_agent`: what a handler cannot do, because only a middleware may change a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import HumanMessage, ToolMessage
from langgraph.errors import GraphBubbleUp

from bursar.errors import ApprovalRequired, BudgetExceeded, Stopped
from bursar_langchain.gate import Gate
from bursar_langchain.handler import BursarCallbackHandler
from bursar_langchain.hooks import active, hook
from bursar_langchain.slot import Slot, current_slot

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


class AskAgain(GraphBubbleUp):
    """The request has to come again, as it was granted. A GraphBubbleUp, so that no retry on the way catches it."""


class BursarMiddleware(_Middleware):
    """Budgets for an agent made by `create_agent`: `create_agent(model, tools, middleware=[BursarMiddleware(bursar)])`.

    Sends the model and the maximum output that a budget's thresholds ask for, makes the maximum smaller where the budget has
    no room for more, has streams state their usage, goes to `fallback` (a cheaper model) where the budget has no room for the
    first, and turns a tool that was refused into an error that the model reads. It brings its own handler: model calls and
    tools of this agent are held against the budgets without further ado. Put it first in the list. Raises
    LangChainBudgetExceeded where no model fits, where the agent is stopped, and where a budget asks and nothing can pause.
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
        except BudgetExceeded as error:
            if self._fallback is None or _ends_run(error):
                raise
        return self._call_model(request.override(model=self._fallback), handler)

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            return await self._acall_model(request, handler)
        except BudgetExceeded as error:
            if self._fallback is None or _ends_run(error):
                raise
        return await self._acall_model(request.override(model=self._fallback), handler)

    def _call_model(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        request = _with_usage(request)
        with self._inside(_slot(request)) as slot:
            try:
                return handler(request)
            except AskAgain:
                return handler(_as_granted(request, slot))

    async def _acall_model(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        request = _with_usage(request)
        with self._inside(_slot(request)) as slot:
            try:
                return await handler(request)
            except AskAgain:
                return await handler(_as_granted(request, slot))

    @contextmanager
    def _inside(self, slot: Slot) -> Iterator[Slot]:
        """With the handler active, and with what the calls inside leave open ended on leaving."""
        outer = current_slot.get()
        if outer is not None and outer.run:
            slot.run = outer.run
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
        with self._inside(Slot(_turn(request.state))):
            try:
                return handler(request)
            except BudgetExceeded as error:
                return _refusal(request, error)

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        with self._inside(Slot(_turn(request.state))):
            try:
                return await handler(request)
            except BudgetExceeded as error:
                return _refusal(request, error)


def _ends_run(error: BudgetExceeded) -> bool:
    """Whether neither another model nor doing without the tool is a way out: only an operator has one."""
    return isinstance(error, (ApprovalRequired, Stopped))


def _with_usage(request: Any) -> Any:
    """The request with a model whose streams state their usage. Without it, a stream at another base URL states none."""
    model = request.model
    if "stream_usage" in type(model).model_fields and getattr(model, "stream_usage", None) is not True:
        return request.override(model=model.model_copy(update={"stream_usage": True}))
    return request


def _slot(request: Any) -> Slot:
    """What may be changed of this request."""
    model, settings = request.model, request.model_settings
    name = settings.get("model", getattr(model, _name_field(model), None))
    thinking = settings.get("thinking", getattr(model, "thinking", None))
    fixed = {
        "model": not isinstance(name, str) or getattr(model, "deployment_name", None),  # Azure's stands in the address
        "max_output_tokens": isinstance(thinking, dict)
        and "budget_tokens" in thinking,  # has to be less than the maximum
    }
    return Slot(_turn(request.state), AskAgain, name, tuple(part for part in fixed if not fixed[part]))


def _name_field(model: BaseChatModel) -> str:
    return "model_name" if "model_name" in type(model).model_fields else "model"


def _as_granted(request: Any, slot: Slot) -> Any:
    """The request with the model and the maximum output that were reserved for."""
    model, limit = slot.granted
    settings, changed = dict(request.model_settings), {}
    if model != slot.model:
        fields = {
            _name_field(request.model): model,
            "profile": None,
        }  # what is known of the one is not true of the other
        known = type(request.model).model_fields
        changed["model"] = request.model.model_copy(update={name: fields[name] for name in fields if name in known})
        if "model" in settings:
            settings["model"] = model
    if slot.parked is not None and slot.parked.capped:
        names = slot.limits or (_LIMIT_NAMES.get(type(request.model).__name__, "max_tokens"),)
        settings.update(dict.fromkeys(names, limit))
    return request.override(model_settings=settings, **changed)


def _turn(state: Any) -> str | None:
    """The last message of a human: its id names the run wherever the thread is resumed."""
    messages = state.get("messages", ()) if isinstance(state, dict) else getattr(state, "messages", ())
    return next((message.id for message in reversed(messages) if isinstance(message, HumanMessage)), None)


def _refusal(request: Any, error: BudgetExceeded) -> ToolMessage:
    """The refusal of a tool as the model reads it. Raises the one that ends the run."""
    if _ends_run(error):
        raise error
    call = request.tool_call
    return ToolMessage(f"Not run: {error}", tool_call_id=call["id"], name=call["name"], status="error")
