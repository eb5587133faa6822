"""LlamaIndex's spans: which object a call is made on, what it is inside of, and who it belongs to."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Generator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.tools.types import BaseTool
from llama_index_instrumentation.span import active_span_id
from llama_index_instrumentation.span_handlers import NullSpanHandler

from bursar.ending import unknown
from bursar.errors import ApprovalRequired, BudgetExceeded, Stopped
from bursar_llamaindex.answer import read_drop

if TYPE_CHECKING:
    from bursar_llamaindex.calls import Call

MAX_SPANS = 100_000  # spans whose end never comes make room for new ones
# What `instrument_tags({...})` may say of a call. A workflow's own tags hold the user's text, so no others are read.
_INSTRUMENT_TAGS = ("org", "team", "project", "user", "customer", "workflow", "agent", "run")
_MAX_LENGTH = 512

log = logging.getLogger("bursar.llamaindex")

_open: OrderedDict[str, Span] = OrderedDict()
_MODEL, _TOOL, _OTHER = "model", "tool", "other"


@lru_cache(maxsize=10_000)
def _role_of(cls: type) -> str:
    """What the objects of a class are. To ask pydantic's classes and abstract ones takes longer than all else of a span."""
    return _MODEL if issubclass(cls, (BaseLLM, BaseEmbedding)) else _TOOL if issubclass(cls, BaseTool) else _OTHER


class Outermost:
    """What the spans below one outermost span share: its run, the agent that spoke last, and what a tool was refused for."""

    __slots__ = ("agent", "is_named", "refusal", "run", "workflow")

    def __init__(self, run: str | None, workflow: str | None) -> None:
        self.run = run
        self.workflow = workflow
        self.agent: str | None = None
        self.is_named = False
        self.refusal: BudgetExceeded | None = None


class Span:
    """One method call that LlamaIndex traces.

    `begun`: the events that began in it, as (guard, event). `calls`: those of its calls that are not ended, `pending` those
    that are not reserved yet. `failed`: the error that ended it. `is_tools`: whether it is an agent's calling of a tool, which
    hands every error to the model. `waits`: whether its calls are reserved by the gate, where an async caller can wait.
    """

    __slots__ = (
        "agent", "arguments", "begun", "calls", "failed", "id", "instance", "instrument_tags", "is_tools", "method", "outermost",
        "parent", "pending", "role", "tool", "waits",
    )  # fmt: skip

    def __init__(
        self, id: str, instance: Any, arguments: Mapping[str, Any], parent: Span | None, tags: Mapping[str, Any]
    ) -> None:
        name, _, unique = id.partition("-")
        self.id = id
        self.method = name.rpartition(".")[2]
        self.instance = instance
        self.arguments = arguments
        self.parent = parent
        self.instrument_tags = tags
        self.role = _role_of(instance.__class__)
        self.outermost: Outermost
        self.agent: str | None
        self.waits = False
        self.begun: list[tuple[int, str]] = []
        self.calls: list[Call] = []
        self.pending: deque[Call] = deque()
        self.failed: BaseException | None = None
        self.tool: str | None = None
        self.is_tools = self.method == "call_tool"
        if parent is not None:
            self.outermost = parent.outermost
            self.tool = parent.tool
            self.is_tools = self.is_tools or parent.is_tools
        elif self.role == _MODEL:
            self.outermost = Outermost(None, None)  # it stands alone: its run is the process's
        else:
            self.outermost = Outermost(unique or id, name.rpartition(".")[0])
        top = self.outermost
        if tags and not top.is_named and (run := tags.get("llamaindex.run_id")) is not None:
            top.run, top.is_named = str(run), True  # the first workflow's own, which its handler shows to the user
        if self.role == _TOOL:
            self.tool = instance.metadata.name
        # Whose turn it is. A step that runs an agent's tools does not say whose they are: they are the last speaker's.
        self.agent = top.agent if parent is None or parent.agent is None else parent.agent
        if self.method == "run_agent_step":
            self.agent = top.agent = getattr(arguments.get("ev"), "current_agent_name", None)

    def is_nested(self, guard: int) -> bool:
        """Whether its object is in the middle of a call already: LlamaIndex then tells of one call several times."""
        above = self.parent
        while above is not None:
            if above.instance is self.instance and any(one == guard for one, _ in above.begun):
                return True
            above = above.parent
        return False

    def raise_refusal(self) -> None:
        """Before the next model call: the refusal that stopped a tool of this run, which its agent did not let out."""
        error = self.outermost.refusal
        if error is not None:
            if not self.is_tools:
                self.outermost.refusal = None
            raise error

    def next_pending(self) -> list[Call]:
        """The calls of the next announced event: one for each guard. Raises the error that has ended the rest of their batch."""
        if not self.pending:
            return []  # a call inside of a call that is reserved already, or one that no guard is for
        calls = [self.pending.popleft()]
        while self.pending and self.pending[0].event == calls[0].event:
            calls.append(self.pending.popleft())
        if self.failed is not None:
            if not self.pending:
                _open.pop(self.id, None)
            raise self.failed
        return calls

    def tags(self) -> dict[str, str]:
        """Whose the call is, as far as the framework knows."""
        top, said = self.outermost, self.instrument_tags
        found: dict[str, Any] = {"run": top.run, "workflow": top.workflow, "agent": self.agent, "tool": self.tool}
        if said:
            found |= {name: said[name] for name in _INSTRUMENT_TAGS if name in said}
        return clean(found)


def current() -> Span | None:
    """The innermost span of this thread or task."""
    id = active_span_id.get()
    return None if id is None else _open.get(id)


class noted:
    """What an operator has to decide ends an agent, though it was a tool of it that was refused."""

    __slots__ = ()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ApprovalRequired, Stopped)):
            span = current()
            if span is not None and span.is_tools:
                span.outermost.refusal = error


class Spans(NullSpanHandler):
    """Follows every span of the process. LlamaIndex swallows what it raises, so it refuses nothing: it has gates prepared."""

    def prepare(self, span: Span) -> None:
        """Before a model announces its call."""

    @classmethod
    def class_name(cls) -> str:
        return "BursarSpans"

    def span_enter(
        self,
        id_: str,
        bound_args: Any,
        instance: Any = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        parent = None if parent_id is None else _open.get(parent_id)
        span = Span(id_, instance, bound_args.arguments, parent, tags or {})
        _open[id_] = span
        if len(_open) > MAX_SPANS:
            _open.popitem(last=False)
        if span.role == _MODEL:
            try:
                self.prepare(span)
            except Exception:
                # Raised, it would be swallowed without a trace, and the call would go out unguarded in silence.
                log.exception("%s cannot be guarded", type(instance).__name__)

    def span_exit(self, id_: str, bound_args: Any, instance: Any = None, result: Any = None, **more: Any) -> None:
        span = _open.pop(id_, None)
        if span is None or not span.calls:
            return
        for call in span.calls:
            if not call.is_open:
                continue
            if isinstance(result, (Generator, AsyncGenerator)):
                # A stream that nobody begins to read has no end that would be told of; some send all the same.
                finalizer = weakref.finalize(result, call.end_soon, unknown("its stream was not read to its end"))
                finalizer.atexit = False  # type: ignore[misc, unused-ignore]  # mypy 2.0 does not know it
            else:
                call.end(read_drop(None))

    def span_drop(
        self, id_: str, bound_args: Any, instance: Any = None, err: BaseException | None = None, **more: Any
    ) -> None:
        span = _open.get(id_)
        if span is None:
            return
        span.failed = err or RuntimeError("the call was dropped")
        for call in span.calls:
            call.drop(read_drop(err, was_sent=span.waits))
        if not span.pending or span.method != "aget_text_embedding_batch":
            _open.pop(id_, None)  # else the gate finds the error when the rest of the batch comes to it


def clean(tags: Mapping[str, Any]) -> dict[str, str]:
    """The tags as the books take them: printable text of at most 512 characters; those without a value are left out."""
    cleaned = {}
    for name, value in tags.items():
        if value is not None and (text := str(value)):
            if not text.isprintable():
                text = "".join(sign if sign.isprintable() else "?" for sign in text)
            cleaned[name] = text[:_MAX_LENGTH]
    return cleaned
