"""The callback handler: takes down what LlamaIndex announces, has the gate reserve it, and settles where it ends."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.llms.custom import CustomLLM
from llama_index_instrumentation import root_dispatcher

from bursar.ending import drain, settled, unknown
from bursar.errors import InvalidInput
from bursar_llamaindex.calls import Call
from bursar_llamaindex.embedded import listen, sending
from bursar_llamaindex.gate import Gate
from bursar_llamaindex.granted import ask_usage, changeable, write
from bursar_llamaindex.messages import plain_messages
from bursar_llamaindex.request import embedded_texts, kind_of, read_embedding, read_llm, sends_nothing
from bursar_llamaindex.serving import is_served
from bursar_llamaindex.spans import Span, Spans, clean, current

if TYPE_CHECKING:
    from bursar import Bursar

_HEARD = (CBEventType.LLM, CBEventType.EMBEDDING)
_IGNORED = [kind for kind in CBEventType if kind not in _HEARD]
# The methods of embedding models that ask the rate limiter; those for images do not.
_ASKING = frozenset(
    f"{a}{name}"
    for a in ("", "a")
    for name in ("get_query_embedding", "get_text_embedding", "get_text_embedding_batch")
)


class BursarCallbackHandler(BaseCallbackHandler):
    """Holds every LLM and embedding call of the objects it is given to against the budgets of `bursar`.

    Put it into a `CallbackManager`, or see `install`. `tags` are added to all its calls, `instrument_tags({"user": "ann"})`
    to those inside; a scope's own tags win over both. The caller gets BudgetExceeded, and the other errors of
    `Bursar.reserve`, before anything is sent; later only Stopped, out of a stream that a switch or a budget has ended.
    """

    def __init__(self, bursar: Bursar, **tags: str) -> None:
        super().__init__(event_starts_to_ignore=_IGNORED, event_ends_to_ignore=_IGNORED)
        self.bursar = bursar
        self.tags = clean(tags)
        self.is_active = True
        # A call lives as long as somebody can tell of its end: its span, or its stream.
        self._calls: weakref.WeakValueDictionary[str, Call] = weakref.WeakValueDictionary()
        self._lazy: weakref.WeakValueDictionary[tuple[int, int], Call] = weakref.WeakValueDictionary()
        follow_spans()

    def __deepcopy__(self, memo: dict[int, Any]) -> BursarCallbackHandler:
        return self  # a copied LLM is held against the same budgets

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until every stream that was abandoned so far is booked; False when that takes longer.

        For the end of a program, before `bursar.close()`: a stream that is dropped is booked a moment later.
        """
        return drain(timeout_s)

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",
        **more: Any,
    ) -> str:
        span, guard = current(), id(self.bursar)
        if event_type not in _HEARD or not self.is_active:
            return event_id
        if span is None:
            if is_served(None):
                return event_id
            raise InvalidInput(
                "LlamaIndex traces no span of this call, so what it calls is not known. Leave Bursar's span handler on the "
                "root dispatcher, or call a copy made by guard_llm.",
                argument="span_handlers",
            )
        if (guard, event_id) in span.begun or span.is_nested(guard) or is_served(span.instance):
            return event_id
        call = self._call(event_type, span, payload or {}, event_id)
        if call is None:
            return event_id
        span.begun.append((guard, event_id))
        if self._continues(span, call, payload or {}):
            return event_id
        if span.waits:
            span.pending.append(call)
        else:
            call.reserve()
        span.calls.append(call)
        self._calls[event_id] = call
        return event_id

    def _call(self, kind: CBEventType, span: Span, payload: dict[str, Any], event_id: str) -> Call | None:
        instance = span.instance
        if sends_nothing(instance):
            return None
        tags = {"default_tags": {**self.tags, **span.tags()}}
        if kind is CBEventType.EMBEDDING:
            batch = sum(guard == id(self.bursar) for guard, _ in span.begun)
            texts = embedded_texts(span.arguments, batch, getattr(instance, "embed_batch_size", 1))
            return Call(self.bursar, {**read_embedding(instance, texts), **tags}, event_id)
        span.raise_refusal()
        settings = payload.get(EventPayload.ADDITIONAL_KWARGS, {})
        call = announce_llm(self.bursar, instance, span.method, _conversation(payload), settings, event_id)
        call.request.update(tags)
        return call

    def _continues(self, span: Span, call: Call, payload: dict[str, Any]) -> bool:
        """Whether the call is one of those that LlamaIndex's own async streams make when they are first read, after their span.

        They hand on the messages or the prompt as the very same object, and each makes one.
        """
        conversation = _conversation(payload)
        key = (id(span.instance), id(conversation))
        if span.method in ("stream_chat", "stream_complete"):
            return self._lazy.pop(key, None) is not None
        inherited = getattr(type(span.instance), span.method, None)
        if span.method.startswith("astream_") and getattr(inherited, "__module__", "") == CustomLLM.__module__:
            self._lazy[key] = call  # which keeps the conversation, and with it its id
        return False

    def on_event_end(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, event_id: str = "", **more: Any
    ) -> None:
        call = self._calls.pop(event_id, None)
        if call is None:
            return
        payload = payload or {}
        error = payload.get(EventPayload.EXCEPTION)
        if event_type is CBEventType.EMBEDDING and payload:
            sending.set(())
        if error is not None:
            call.drop(call.failed(error))
        elif event_type is CBEventType.EMBEDDING:
            ending = (
                unknown("LlamaIndex hands on no usage of embeddings") if call.usage is None else settled(call.usage)
            )
            (call.end if payload else call.drop)(ending)  # nothing came of it: it was cancelled
        else:
            response = payload.get(EventPayload.RESPONSE) or payload.get(EventPayload.COMPLETION)
            call.end(call.answered(response))

    def start_trace(self, trace_id: str | None = None) -> None:
        """Nothing: a trace is no call."""

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None:
        """Nothing: a trace is no call."""


def _conversation(payload: dict[str, Any]) -> Any:
    return payload.get(EventPayload.MESSAGES) or payload.get(EventPayload.PROMPT) or ""


def announce_llm(
    bursar: Bursar, instance: Any, method: str, conversation: Any, settings: dict[str, Any], event_id: str
) -> Call:
    """The call that an LLM is about to make. `settings` are its live keyword arguments, changed in place: streams of OpenAI
    state their usage only when asked to, and what a budget grants is sent in place of what was asked for.
    """
    api = kind_of(type(instance)).api
    request = read_llm(instance, method, plain_messages(conversation), settings)
    request["changeable"] = can = changeable(instance, settings)
    request["resize"] = request["max_output_tokens"] is None and "max_output_tokens" in can
    call = Call(bursar, request, event_id, partial(write, instance, settings, request["model"]), conversation)
    if api and "stream" in method:
        from bursar_llamaindex.stopping import make_stoppable  # httpx loads with the clients that use it

        make_stoppable(call, instance, settings, is_async=method.startswith("a"))
        if api == "chat":
            call.hides_usage = ask_usage(instance, settings)
    return call


def found_tags() -> dict[str, str]:
    """Whose a call would be that is made now, as far as LlamaIndex knows."""
    span = current()
    return {} if span is None else span.tags()


# -- the gate, just in time --------------------------------------------------------------------------------------

installed: list[BursarCallbackHandler] = []  # what `install` guards every object with
_managers: weakref.WeakSet[CallbackManager] = weakref.WeakSet()


def _prepare(span: Span) -> None:
    """Before the object announces its call: give it the installed handlers, and the gate where any handler is of ours."""
    instance = span.instance
    manager = getattr(instance, "callback_manager", None)
    if not isinstance(manager, CallbackManager):
        if not installed:
            return
        manager = instance.callback_manager = CallbackManager([])
    ours = [one for one in manager.handlers if isinstance(one, BursarCallbackHandler) and one.is_active]
    if not ours and installed:
        ours = list(installed)
        manager.handlers.extend(ours)  # in place: the list may be shared with Settings, and its user may add to it
        _managers.add(manager)
    if not ours:
        return
    if not isinstance(instance.rate_limiter, Gate):
        instance.rate_limiter = Gate(instance.rate_limiter)
    if isinstance(instance, BaseLLM):
        span.waits = True
    elif span.method in _ASKING and not _reads_cache(instance, span.method):
        span.waits = True
        listen(instance, is_async=span.method.startswith("a"))


def _reads_cache(instance: BaseEmbedding, method: str) -> bool:
    """Of the methods that ask the rate limiter, one does not where there is a cache."""
    return method == "aget_text_embedding_batch" and instance.embeddings_cache is not None


class _Following(Spans):
    def prepare(self, span: Span) -> None:
        _prepare(span)


_spans = _Following()


def follow_spans() -> None:
    """Have LlamaIndex tell of every span."""
    if not any(handler is _spans for handler in root_dispatcher.span_handlers):
        root_dispatcher.add_span_handler(_spans)


def installed_bursar(bursar: Bursar | None) -> Bursar:
    """The guard given, else the installed one. Raises InvalidInput where there is neither."""
    if bursar is not None:
        return bursar
    if not installed:
        raise InvalidInput("There is no guard. Call install(bursar) before, or give one.", argument="bursar")
    return installed[0].bursar


def forget(handler: BursarCallbackHandler) -> None:
    """Take an installed handler away from the objects that it was given to. Calls that are under way still settle."""
    handler.is_active = False
    for manager in list(_managers):
        if handler in manager.handlers:
            manager.handlers.remove(handler)
