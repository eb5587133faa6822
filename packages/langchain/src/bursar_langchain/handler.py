"""The callback handler: reserves where LangChain announces a call, settles where it ends, and raises where a budget refuses."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import CO_COROUTINE
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler

from bursar.ending import Ending, amid_bursar, end_soon, released, settled, told_only, unknown
from bursar.sending import Sending
from bursar_langchain.answer import read_end, read_error
from bursar_langchain.asking import areserve, reserve
from bursar_langchain.gate import Gate, Open
from bursar_langchain.request import limit_names, read_start
from bursar_langchain.runs import clean
from bursar_langchain.slot import Slot, current_slot

if TYPE_CHECKING:
    import asyncio

    from bursar import Bursar, Reservation


class _TwoWays:
    """A callback that is a coroutine function to LangChain's async path, and a plain function to everything else.

    LangChain swallows what an async handler raises on its sync path, and a sync handler that waits for headroom would
    hold up the event loop on the async path. So one that has to raise and to wait has to be both. The async path asks
    for the callback from inside a coroutine. Whoever else asks gets the plain one, which always gates.
    """

    def __init__(self, plain: Callable[..., None], coroutine: Callable[..., Any]) -> None:
        self._plain, self._coroutine = plain, coroutine

    def __get__(self, handler: object, owner: type | None = None) -> Any:
        is_async = sys._getframe(1).f_code.co_flags & CO_COROUTINE
        return (self._coroutine if is_async else self._plain).__get__(handler, owner)


class _Announced(NamedTuple):
    """A model call that a start event announces: what to reserve, or the reservation that waits for it."""

    opened: Open
    slot: Slot | None
    request: dict[str, Any]
    reservation: Reservation | None
    limits: tuple[str, ...]


class BursarCallbackHandler(BaseCallbackHandler):
    """Holds every model and tool call of the runs it is given to against the budgets of `bursar`.

    Put it into `config={"callbacks": [handler]}`, or see `install` and `BursarMiddleware`. `tags` are added to all its
    calls; `config={"metadata": {"bursar": {"user": "ann"}}}` adds more to one. A scope's own tags win over both. Raises
    LangChainBudgetExceeded, and the other errors of `Bursar.reserve`, before anything is sent; never later.
    """

    raise_error = True  # without it, LangChain logs a refusal and sends the call
    run_inline = True  # in the caller's own task, which may be cancelled; see _TwoWays for why nothing blocks there
    ignore_retriever = True  # not ignore_agent: LangChain means tools by it
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self, bursar: Bursar, **tags: str) -> None:
        self.bursar = bursar
        self.tags = clean(tags)
        self._gate = Gate.of(bursar)

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until every call that was announced has ended, in the background too; False when that takes longer.

        For the end of a program, before `bursar.close()`: a call that was cancelled or abandoned is booked a moment later.
        """
        return self._gate.drain(timeout_s)

    # -- model calls ---------------------------------------------------------------------------------------------

    def _announced(
        self,
        serialized: Any,
        inputs: Sequence[Any],
        run_id: UUID,
        parent_run_id: UUID | None,
        batch_size: int = 1,
        invocation_params: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> _Announced | None:
        """The call of a start event; None when another handler of the same guard has entered it already."""
        params, metadata, slot = invocation_params or {}, metadata or {}, current_slot.get()
        is_chat = not isinstance(inputs[0], str)  # a list of messages, or a prompt
        # Only one `generate([a, b])` hands the same settings object to several calls.
        said = inputs[0] if invocation_params is None else invocation_params
        opened = self._gate.begin(run_id, parent_run_id, said, in_batch=batch_size > 1, is_chat=is_chat)
        if opened is None:
            return None
        with self._gate.admission(run_id, opened):
            request = read_start(serialized, inputs[0] if is_chat else inputs, params, metadata)
            opened.provider, opened.tools = request["provider"], request["body"].get("tools")
            request["default_tags"] = self._tags(parent_run_id, metadata, slot)
            reservation = self._gate.adopt(slot, request["model"], request["max_output_tokens"])
            request["changeable"] = () if slot is None else slot.offers(request["model"])
            request["resize"] = "max_output_tokens" in request["changeable"]
        return _Announced(opened, slot, request, reservation, limit_names(params))

    def _start(
        self, serialized: Any, inputs: Sequence[Any], *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        call = self._announced(serialized, inputs, run_id, parent_run_id, **more)
        if call is not None:
            with self._gate.admission(run_id, call.opened):
                block = partial(self.bursar.call, **call.request)
                self._admitted(run_id, call, call.reservation or reserve(block))

    async def _astart(
        self, serialized: Any, inputs: Sequence[Any], *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        call = self._announced(serialized, inputs, run_id, parent_run_id, **more)
        if call is not None:
            with self._gate.admission(run_id, call.opened):
                block = partial(self.bursar.call, **call.request)
                self._admitted(run_id, call, call.reservation or await areserve(block))
            _end_with_task(self._gate, run_id.int, call.opened)

    def _admitted(self, run_id: UUID, call: _Announced, reservation: Reservation) -> None:
        """It is reserved: the model's client sends it from here on, or the middleware sends it as it was granted."""
        request = call.request
        if call.slot is not None:
            call.slot.park(reservation, request["model"], request["max_output_tokens"], call.limits)
        self._gate.admitted(run_id, call.opened, reservation, call.slot)
        call.opened.sending = Sending(self.bursar, request["model"], request["messages"]).begin()

    def on_llm_new_token(self, token: Any, *, run_id: UUID, **more: Any) -> None:
        self._gate.answering(run_id.int)

    def _tags(self, parent_run_id: UUID | None, metadata: Mapping[str, Any], slot: Slot | None) -> dict[str, str]:
        found = self._gate.runs.tags(parent_run_id, metadata, None if slot is None else slot.run)
        own = metadata.get("bursar")
        return {**found, **self.tags, **(clean(own) if isinstance(own, Mapping) else {})}

    def _llm_end(self, response: Any, *, run_id: UUID, **more: Any) -> None:
        opened = self._gate.take(run_id.int, response)
        if opened is not None:
            self._gate.finish(opened, _read(read_end, opened, response))

    async def _allm_end(self, response: Any, *, run_id: UUID, **more: Any) -> None:
        opened = self._gate.take(run_id.int, response)
        if opened is not None:
            await self._gate.afinish(opened, _read(read_end, opened, response))

    def _llm_error(self, error: BaseException, *, run_id: UUID, response: Any = None, **more: Any) -> None:
        opened = self._gate.take(run_id.int, error)
        if opened is None:
            return
        ending = _read(read_error, opened, error, response)
        if amid_bursar():  # the garbage collector's doing
            end_soon(partial(self._gate.finish, opened, ending))
        else:
            self._gate.finish(opened, ending)
        if opened.is_chat:
            # `generate([a, b, c])` tells of the failed one alone: a was answered, and its answer dropped; c never sent.
            for key, is_earlier in self._gate.siblings(opened):
                reason = "its answer was dropped when another of its batch failed"
                self._gate.end_now(key, unknown(reason) if is_earlier else released("not sent: one before it failed"))

    async def _allm_error(self, error: BaseException, *, run_id: UUID, response: Any = None, **more: Any) -> None:
        opened = self._gate.take(run_id.int, error)
        if opened is not None:
            await self._gate.afinish(opened, _read(read_error, opened, error, response))

    on_chat_model_start = _TwoWays(_start, _astart)
    on_llm_start = _TwoWays(_start, _astart)
    on_llm_end = _TwoWays(_llm_end, _allm_end)
    on_llm_error = _TwoWays(_llm_error, _allm_error)

    # -- tools ---------------------------------------------------------------------------------------------------

    def _tool_call(
        self, serialized: Mapping[str, Any] | None, given: str, parent_run_id: UUID | None, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = clean({"tool": more.get("name") or (serialized or {}).get("name") or "tool"})["tool"]
        metadata = more.get("metadata") or {}
        connection = metadata.get("connection") or metadata.get("mcp_server")
        tags = self._tags(parent_run_id, metadata, current_slot.get())
        tags.pop("tool", None)
        return {
            "name": name,
            "arguments": more.get("inputs") or given,
            "connection": None if connection is None else str(connection),
            "default_tags": tags,
        }

    def _tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        opened = self._gate.begin(run_id, parent_run_id, serialized)
        if opened is None:
            return
        call = self._tool_call(serialized, input_str, parent_run_id, more)
        with self._gate.admission(run_id, opened):
            self._gate.admitted(run_id, opened, reserve(partial(self.bursar.tool, **call)))
        self._gate.runs.start_tool(run_id, parent_run_id, call["name"])

    async def _atool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        opened = self._gate.begin(run_id, parent_run_id, serialized)
        if opened is None:
            return
        call = self._tool_call(serialized, input_str, parent_run_id, more)
        with self._gate.admission(run_id, opened):
            self._gate.admitted(run_id, opened, await areserve(partial(self.bursar.tool, **call)))
        self._gate.runs.start_tool(run_id, parent_run_id, call["name"])

    def _tool_end(self, output: Any, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)
        opened = self._gate.take(run_id.int, output)
        if opened is not None:
            self._gate.finish(opened, settled(None))

    async def _atool_end(self, output: Any, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)
        opened = self._gate.take(run_id.int, output)
        if opened is not None:
            await self._gate.afinish(opened, settled(None))

    def _tool_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)
        opened = self._gate.take(run_id.int, error)
        if opened is not None:
            self._gate.finish(opened, _failed_tool(error))

    async def _atool_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)
        opened = self._gate.take(run_id.int, error)
        if opened is not None:
            await self._gate.afinish(opened, _failed_tool(error))

    on_tool_start = _TwoWays(_tool_start, _atool_start)
    on_tool_end = _TwoWays(_tool_end, _atool_end)
    on_tool_error = _TwoWays(_tool_error, _atool_error)

    # -- chains and graphs ---------------------------------------------------------------------------------------

    def _chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        runs, metadata = self._gate.runs, more.get("metadata") or {}
        with told_only():
            thread = runs.resumes_unknown_thread(parent_run_id, metadata, inputs)
            if thread is not None:
                self._find_thread(thread)
        runs.start_chain(run_id, parent_run_id, metadata, more.get("name"), inputs)

    async def _achain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        import asyncio  # callers without an event loop need not load it

        runs, metadata = self._gate.runs, more.get("metadata") or {}
        with told_only():
            thread = runs.resumes_unknown_thread(parent_run_id, metadata, inputs)
            if thread is not None:
                await asyncio.to_thread(self._find_thread, thread)
        runs.start_chain(run_id, parent_run_id, metadata, more.get("name"), inputs)

    def _find_thread(self, thread: str) -> None:
        """Another process began the thread's run: the books know which it was."""
        run = None
        for record in self.bursar.records(**clean({"thread": thread})):
            run = record.tags["run"]
        if run is not None:
            self._gate.runs.remember(thread, run)

    on_chain_start = _TwoWays(_chain_start, _achain_start)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self._gate.runs.end(run_id)
        if not isinstance(error, Exception):  # a cancellation: a failed branch lets its siblings go on
            self._gate.end_children(run_id)


def _read(reader: Callable[..., Ending], opened: Open, *event: Any) -> Ending:
    """The ending that an event tells of. One that cannot be read books the worst case."""
    options = {"in_batch": opened.in_batch, "tools": opened.tools} if reader is read_end else {}
    try:
        return reader(opened.provider, *event, **options)
    except Exception as error:  # noqa: BLE001 - raised, it would replace the answer, and leave the reservation open
        return unknown(f"its end could not be read: {error!r}")


def _failed_tool(error: BaseException) -> Ending:
    """A tool that stops to ask a human runs again from its start; any other failure is counted."""
    if type(error).__name__ == "GraphInterrupt":
        return released("interrupted: it will run again")
    return settled(None, outcome="failed", reason=type(error).__name__)


def _end_with_task(gate: Gate, key: int, opened: Open) -> None:
    """When the task that makes the call is cancelled, or leaves it unanswered, LangChain reports no end.

    A stream of which a part has come may go on in another task.
    """
    import asyncio  # callers without an event loop need not load it

    task = asyncio.current_task()
    if task is None:
        return

    def done(task: asyncio.Task[Any]) -> None:
        if task.cancelled() or opened.sending is not None:
            gate.end_soon(key, opened.order)

    def undo() -> None:
        if (still := held()) is not None:
            still.remove_done_callback(done)

    task.add_done_callback(done)
    # Weak: a failed task keeps the frames of its call alive, whose death is what tells of the others' end.
    held, opened.cleanup = weakref.ref(task), undo
