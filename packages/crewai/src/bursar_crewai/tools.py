"""Tool calls: reserved when CrewAI announces the tool, booked when it has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from crewai.utilities.string_utils import sanitize_tool_name

from bursar_crewai.calls import gate
from bursar_crewai.frames import Frame, current, enter, leave, log
from bursar_crewai.guard import guard_here

_NEVER_RAN = ("usage_limit", "unknown_tool")


def begin_tool(source: Any, event: Any) -> None:
    """CrewAI is about to run a tool. Raises where a budget refuses: the tool then does not run, and the crew stops."""
    agent = getattr(source, "agent", None)
    guard = guard_here(agent)
    if guard is None:
        return
    role = event.agent_role or getattr(agent, "role", None)
    name = sanitize_tool_name(event.tool_name)  # a ReAct agent's start says "Search the web", its end "search_the_web"
    frame = enter(guard, name, tool=name, agent=role)
    try:
        if not _is_cached(source, event):
            block = guard.bursar.tool(name, arguments=event.tool_args, default_tags=_without_tool(frame))
            with gate():
                frame.hold(block.__enter__())
    except BaseException:
        leave(frame)
        raise


def end_tool(event: Any) -> None:
    """The tool has ended. One that was answered from the cache, or that never ran, costs nothing."""
    name = sanitize_tool_name(event.tool_name)
    frame: Frame | None = current()
    while frame is not None and frame.subject != name:
        frame = frame.outer
    if frame is None:
        return
    failure = getattr(event, "failure", None)
    why = str(getattr(getattr(failure, "reason", None), "value", ""))
    released = None
    if getattr(event, "from_cache", False):
        released = "answered from CrewAI's cache"
    elif why in _NEVER_RAN or str(getattr(event, "output", "")).startswith("Tool execution blocked by hook"):
        released = f"the tool did not run: {why or 'denied by a hook'}"
    frame.end_tool(released)
    leave(frame)


def _without_tool(frame: Frame) -> dict[str, str]:
    """The tags of a tool's own record: its name is the call's, and those outside may name an outer tool."""
    return {name: value for name, value in frame.tags.items() if name != "tool"}


def _is_cached(source: Any, event: Any) -> bool:
    """Whether the executor will find the answer in the crew's cache: with native tool calls no event says so."""
    cache = getattr(getattr(source, "tools_handler", None), "cache", None)
    if cache is None or not isinstance(event.tool_args, Mapping):
        return False  # ReAct agents state their arguments as text, and say afterwards what came from the cache
    try:
        key = json.dumps(event.tool_args) if event.tool_args else ""
        return any(
            cache.read(tool=name, input=key) is not None
            for name in {event.tool_name, sanitize_tool_name(event.tool_name)}
        )
    except Exception as error:  # noqa: BLE001 - a cache that cannot be read must not let the tool run unreserved
        log.warning("the cache of tools cannot be read: %s", error)
        return False
