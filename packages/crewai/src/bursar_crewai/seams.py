"""Where Bursar stands inside CrewAI: its clients' calls, its events, its execution hooks and its embedding functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from importlib import metadata
from typing import Any

from crewai import Agent, Crew, Flow
from crewai.events import event_bus
from crewai.events.types import agent_events, llm_events, tool_usage_events
from crewai.hooks import InterceptionPoint
from crewai.hooks.dispatch import register
from crewai.llms.base_llm import BaseLLM
from crewai.rag.embeddings import factory

from bursar.errors import InvalidInput
from bursar_crewai.calls import arun, is_part, note_answer, note_chunk, note_tools, run
from bursar_crewai.embeddings import guard_embedder
from bursar_crewai.frames import clean, current, enter, find, inside, leave
from bursar_crewai.guard import BursarCrew, guard_here, guard_of
from bursar_crewai.request import read_request
from bursar_crewai.retries import give_back, take_over
from bursar_crewai.tools import begin_tool, end_tool

_MARK = "_bursar_guards"  # on a wrapped method: the class whose method it guards
_EVENTS = "publish_stream_event"  # what the event bus calls with every event, in the emitting thread, first of all
_RESPONSES_USAGE = "_extract_responses_token_usage"  # what OpenAI's client asks of each answer of the Responses API
_lock = threading.Lock()
_open = False


def open_seams() -> None:
    """Once per process. They do nothing where no guard holds. Raises InvalidInput where CrewAI cannot be guarded."""
    global _open
    with _lock:
        if _open:
            return
        _check_release()
        _guard_clients()
        _follow_agents()
        _follow_interrupts()
        setattr(event_bus, _EVENTS, _seen_by(getattr(event_bus, _EVENTS)))
        register(InterceptionPoint.EXECUTION_START, _begin_execution)
        register(InterceptionPoint.EXECUTION_END, _end_execution)
        build = factory.build_embedder_from_provider
        factory.build_embedder_from_provider = wraps(build)(lambda provider: guard_embedder(build(provider)))
        _open = True


def _check_release() -> None:
    """That this CrewAI has all that the seams stand on; a later release may have moved it."""
    version = metadata.version("crewai")
    missing = [
        name
        for holder, name in (
            (BaseLLM, "_track_token_usage_internal"),
            (BaseLLM, "call"),
            (BaseLLM, "acall"),
            (event_bus, _EVENTS),
            (Agent, "kickoff"),
            (Agent, "kickoff_async"),
            (Crew, "akickoff"),
            (Flow, "kickoff_async"),
            (factory, "build_embedder_from_provider"),
            (tool_usage_events, "ToolUsageStartedEvent"),
        )
        if not hasattr(holder, name)
    ]
    floor = tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) >= (1, 15, 19)
    if missing or not floor:
        raise InvalidInput(
            f"CrewAI {version} cannot be guarded{f': it has no {missing}' if missing else ''}. "
            "Install crewai>=1.15.19,<2, or a newer bursar-crewai.",
            version=version,
        )


# -- model calls -------------------------------------------------------------------------------------------------------


def _guard_clients() -> None:
    """Wrap the `call` and `acall` of every client class, those to come included."""
    for kind in _below(BaseLLM):
        _guard_client(kind)
    _wrap_usage(BaseLLM)
    inherited = BaseLLM.__dict__.get("__init_subclass__")

    def __init_subclass__(cls: type[BaseLLM], **options: Any) -> None:
        _guard_client(cls)
        if inherited is None:
            super(BaseLLM, cls).__init_subclass__(**options)
        else:
            inherited.__func__(cls, **options)  # CrewAI's retries come around the guard: each attempt is reserved

    BaseLLM.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[method-assign, assignment, arg-type]


def _below(kind: type) -> list[type]:
    below: list[type] = kind.__subclasses__()
    return [one for direct in below for one in (direct, *_below(direct))]


def _guard_client(kind: type) -> None:
    if "_track_token_usage_internal" in kind.__dict__:
        _wrap_usage(kind)
    if _RESPONSES_USAGE in kind.__dict__:
        setattr(kind, _RESPONSES_USAGE, _shown(getattr(kind, _RESPONSES_USAGE)))
    for name, wrap in (("call", _guarded_call), ("acall", _guarded_acall)):
        method = kind.__dict__.get(name)
        if method is None or getattr(method, "__isabstractmethod__", False):
            continue
        retried = getattr(method, "_crewai_rate_limit_wrapped", False)
        setattr(kind, name, wrap(kind, method.__wrapped__ if retried else method))
        if retried:
            kind._wrap_call_method(name)  # type: ignore[attr-defined]


def _guarded_call(kind: type, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, messages: Any, *args: Any, **options: Any) -> Any:
        held = _held(kind, "call", self, messages, args, options)
        if held is None:
            return method(self, messages, *args, **options)
        guard, said, repeats = held
        return run(guard.bursar, self, said, lambda client: method(client, messages, *args, **options), repeats)

    return call


def _guarded_acall(kind: type, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    async def acall(self: Any, messages: Any, *args: Any, **options: Any) -> Any:
        held = _held(kind, "acall", self, messages, args, options)
        if held is None:
            return await method(self, messages, *args, **options)
        guard, said, repeats = held
        return await arun(guard.bursar, self, said, lambda client: method(client, messages, *args, **options), repeats)

    return acall


_POSITIONS = ("tools", "callbacks", "available_functions", "from_task", "from_agent", "response_model")


def _held(
    kind: type, name: str, llm: Any, messages: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[BursarCrew, dict[str, Any], int] | None:
    """Whose budgets hold for this call, what to say of it, and how often the guard is to try again.

    None where no budgets hold, or where the call is reserved already.
    """
    owner = next((one for one in type(llm).__mro__ if name in one.__dict__), kind)
    if owner is not kind or is_part(llm, messages):  # the call of a class above by `super()`, or a step of a call
        return None
    given = {**dict(zip(_POSITIONS, args, strict=False)), **options}
    agent, task = given.get("from_agent"), given.get("from_task")
    is_async = name == "acall"
    guard = guard_here(agent)
    if guard is None:
        give_back(llm, is_async=is_async)
        return None
    frame = current()
    if frame is not None:
        frame.raise_refusal()
    own = clean({"agent": getattr(agent, "role", None), "task": getattr(task, "name", None)})
    tags = {**(guard.tags if frame is None else frame.tags), **own}
    said = read_request(llm, messages, given.get("tools"), given.get("response_model"))
    repeats = take_over(llm, is_async=is_async)
    said["default_tags"] = tags
    if repeats is not None:
        said["retries"] = 0
    return guard, said, repeats or 0


def _wrap_usage(kind: Any) -> None:
    original = kind._track_token_usage_internal

    @wraps(original)
    def track(self: Any, usage: Any) -> Any:
        owner = next(one for one in type(self).__mro__ if "_track_token_usage_internal" in one.__dict__)
        if owner is kind:  # else it has been noted: the method of a class above, by `super()`
            note_answer(self, usage)
        return original(self, usage)

    kind._track_token_usage_internal = track


def _shown(extract: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @wraps(extract)
    def reading(self: Any, response: Any) -> Any:
        note_tools(self, response)
        return extract(self, response)

    return reading


# -- what is under way -------------------------------------------------------------------------------------------------


def _begin_execution(context: Any) -> None:
    subject = context.crew if context.crew is not None else context.flow
    frame = current()
    guard = guard_of(subject) or (frame.guard if frame is not None else guard_here())
    if guard is not None:
        internal = getattr(type(subject), "is_crewai_internal", False)
        name = None if internal else getattr(subject, "name", None) or type(subject).__name__
        enter(guard, subject, workflow=name)


def _end_execution(context: Any) -> None:
    frame = find(context.crew if context.crew is not None else context.flow)
    if frame is not None:
        leave(frame)


def _follow_agents() -> None:
    """An agent that is asked by itself looks into its memory and knowledge before any event tells of it, and a cancelled one
    has no end that is told.
    """
    plain, waiting = Agent.kickoff, Agent.kickoff_async

    @wraps(plain)
    def kickoff(self: Agent, *args: Any, **options: Any) -> Any:
        guard = guard_here(self)
        with nullcontext() if guard is None else inside(guard, self, agent=self.role):
            return plain(self, *args, **options)

    @wraps(waiting)
    async def kickoff_async(self: Agent, *args: Any, **options: Any) -> Any:
        guard = guard_here(self)
        with nullcontext() if guard is None else inside(guard, self, agent=self.role):
            return await waiting(self, *args, **options)

    Agent.kickoff, Agent.kickoff_async = kickoff, kickoff_async  # type: ignore[method-assign]


def _follow_interrupts() -> None:
    """CrewAI tells of no end where a crew or flow is interrupted or cancelled."""
    plain = Crew.kickoff

    @wraps(plain)
    def kickoff(self: Crew, *args: Any, **options: Any) -> Any:
        with _ended(self):
            return plain(self, *args, **options)

    def followed(waiting: Callable[..., Any]) -> Any:
        @wraps(waiting)
        async def kickoff(self: Any, *args: Any, **options: Any) -> Any:
            with _ended(self):
                return await waiting(self, *args, **options)

        return kickoff

    Crew.kickoff = kickoff  # type: ignore[method-assign]
    Crew.akickoff, Flow.kickoff_async = followed(Crew.akickoff), followed(Flow.kickoff_async)  # type: ignore[method-assign]


@contextmanager
def _ended(subject: object) -> Iterator[None]:
    around = find(subject)  # one that starts itself anew, and goes on
    try:
        yield
    except BaseException:
        frame = find(subject)
        if frame is not None and frame is not around:
            leave(frame)
        raise


def _seen_by(publish: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """CrewAI publishes every event here, in the thread that emits it, before anything happens; handlers come too late."""

    @wraps(publish)
    def publish_stream_event(source: Any, event: Any) -> None:
        seen = _SEEN.get(type(event))
        if seen is not None:
            seen(source, event)
        publish(source, event)

    return publish_stream_event


def _begin_agent(source: Any, event: Any) -> None:
    agent = getattr(event, "agent", None) or source
    guard = guard_here(agent)
    if guard is not None:
        task = getattr(event, "task", None)
        enter(guard, agent, agent=getattr(agent, "role", None), task=getattr(task, "name", None))


def _end_agent(source: Any, event: Any) -> None:
    frame = find(getattr(event, "agent", None) or source)
    if frame is not None:
        leave(frame)


_SEEN: dict[type, Callable[[Any, Any], None]] = {
    llm_events.LLMStreamChunkEvent: lambda source, event: note_chunk(source),
    llm_events.LLMThinkingChunkEvent: lambda source, event: note_chunk(source),
    tool_usage_events.ToolUsageStartedEvent: begin_tool,
    tool_usage_events.ToolUsageFinishedEvent: lambda source, event: end_tool(event),
    tool_usage_events.ToolUsageErrorEvent: lambda source, event: end_tool(event),
    agent_events.AgentExecutionStartedEvent: _begin_agent,
    agent_events.AgentExecutionCompletedEvent: _end_agent,
    agent_events.AgentExecutionErrorEvent: _end_agent,
    agent_events.LiteAgentExecutionStartedEvent: _begin_agent,
    agent_events.LiteAgentExecutionCompletedEvent: _end_agent,
    agent_events.LiteAgentExecutionErrorEvent: _end_agent,
}
