"""Tools with a budget: a guarded copy, because LlamaIndex has no hook that could refuse a tool."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from llama_index.core.tools import AsyncBaseTool, BaseTool, FunctionTool, adapt_to_async_tool

from bursar_llamaindex.handler import follow_spans, found_tags, installed_bursar
from bursar_llamaindex.spans import clean, noted

if TYPE_CHECKING:
    from bursar import Bursar

# The tool whose `acall` is under way: with most tools it ends in their `call`, in a thread of its own.
_awaited: ContextVar[int] = ContextVar("bursar_llamaindex_awaited_tool", default=0)


def guard_tool(
    tool: BaseTool | Callable[..., Any],
    bursar: Bursar | None = None,
    *,
    cost: str | None = None,
    connection: str | None = None,
    **tags: str,
) -> AsyncBaseTool:
    """A copy of the tool, or of a function as a tool, that holds each of its calls against `bursar`, or the installed guard.

    It counts one of the unit `calls`, and costs `cost` ("0.002 USD"), else the tool's price in the price book, else nothing.
    `connection`: what it is reached through, such as an MCP server. A refused tool does not run; an agent reads the refusal
    as the tool's error and goes on. Raises InvalidInput without a guard.
    """
    if not isinstance(tool, BaseTool):
        tool = FunctionTool.from_defaults(tool)
    guarded: Any = copy.copy(adapt_to_async_tool(tool))
    guarded.bursar_block = _Blocks(installed_bursar(bursar), cost, connection, clean(tags))
    guarded.__class__ = _guarded(type(guarded))
    follow_spans()
    return guarded  # type: ignore[no-any-return]


class _Blocks:
    """Makes the block around each call of one tool."""

    def __init__(self, bursar: Bursar, cost: str | None, connection: str | None, tags: dict[str, str]) -> None:
        self._bursar = bursar
        self._cost = cost
        self._connection = connection
        self._tags = tags

    def __call__(self, tool: BaseTool, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tags = {**self._tags, **found_tags()}
        tags.pop("tool", None)  # the tool that this one is called in
        name = clean({"tool": tool.metadata.get_name()})["tool"]
        context = tool.ctx_param_name if isinstance(tool, FunctionTool) else None
        asked: dict[str, Any] = {key: value for key, value in named.items() if key != context}
        if arguments:
            asked["arguments"] = list(arguments)
        return self._bursar.tool(name, cost=self._cost, connection=self._connection, arguments=asked, default_tags=tags)


_classes: dict[type[AsyncBaseTool], type[AsyncBaseTool]] = {}


def _guarded(cls: type[AsyncBaseTool]) -> type[AsyncBaseTool]:
    if cls in _classes.values():
        return cls
    if cls not in _classes:
        _classes[cls] = _subclass(cls)
    return _classes[cls]


def _subclass(cls: type[AsyncBaseTool]) -> type[AsyncBaseTool]:
    class Guarded(cls):  # type: ignore[valid-type, misc]
        bursar_block: _Blocks

        def call(self, *args: Any, **settings: Any) -> Any:
            if _awaited.get() == id(self):
                token = _awaited.set(0)
                try:
                    return super().call(*args, **settings)
                finally:
                    _awaited.reset(token)
            with noted(), self.bursar_block(self, args, settings):
                return super().call(*args, **settings)

        async def acall(self, *args: Any, **settings: Any) -> Any:
            with noted():
                async with self.bursar_block(self, args, settings):
                    if isinstance(self, FunctionTool):  # it runs its function, which may call the tool again
                        return await super().acall(*args, **settings)
                    token = _awaited.set(id(self))
                    try:
                        return await super().acall(*args, **settings)
                    finally:
                        _awaited.reset(token)

    Guarded.__name__, Guarded.__qualname__, Guarded.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Guarded
