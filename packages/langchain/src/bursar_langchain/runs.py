"""Who a call belongs to: LangChain's tree of runs, and the tags that its events carry."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

MAX_RUNS = 100_000  # runs whose end never comes make room for new ones
MAX_THREADS = 10_000
_MAX_LENGTH = 512
_UNNAMED = ("LangGraph", "Runnable")  # what graphs and chains are called that nobody named


class Run(NamedTuple):
    """One run of a chain, graph or tool: the outermost run it belongs to, the named agent and the tool it is in."""

    outermost: str
    agent: str | None
    tool: str | None


class Runs:
    """The runs that are under way, as far as their events are seen, and the last run of each thread of a conversation."""

    def __init__(self) -> None:
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._threads: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.RLock()  # a chain that the garbage collector closes ends amid another's beginning

    def resumes_unknown_thread(
        self, parent_run_id: UUID | None, metadata: Mapping[str, Any], inputs: Any
    ) -> str | None:
        """The thread that this outermost run resumes, when this process has not seen its unfinished run."""
        thread = metadata.get("thread_id")
        if thread is None or not is_resumed(inputs) or (parent_run_id is not None and parent_run_id.int in self._runs):
            return None
        return None if str(thread) in self._threads else str(thread)

    def remember(self, thread: str, run: str) -> None:
        """What the thread's last run was."""
        with self._lock:
            self._threads[thread] = run
            self._threads.move_to_end(thread)
            if len(self._threads) > MAX_THREADS:
                self._threads.popitem(last=False)

    def start_chain(
        self, run_id: UUID, parent_run_id: UUID | None, metadata: Mapping[str, Any], name: str | None, inputs: Any
    ) -> None:
        """A chain or graph begins. One without a known parent is outermost; it goes on with its thread's run if it resumes it."""
        parent = self._runs.get(parent_run_id.int) if parent_run_id is not None else None
        if parent is None:
            outermost, thread = str(run_id), metadata.get("thread_id")
            if thread is not None:
                if is_resumed(inputs):
                    outermost = self._threads.get(str(thread), outermost)
                self.remember(str(thread), outermost)
            agent = name if name and not name.startswith(_UNNAMED) and "langgraph_node" not in metadata else None
            parent = Run(outermost, agent, None)
        self._put(run_id, parent)

    def start_tool(self, run_id: UUID, parent_run_id: UUID | None, tool: str) -> None:
        """A tool begins: the calls inside it carry its name."""
        parent = self._runs.get(parent_run_id.int) if parent_run_id is not None else None
        self._put(run_id, Run("", None, tool) if parent is None else parent._replace(tool=tool))

    def end(self, run_id: UUID) -> None:
        """A run has ended."""
        with self._lock:
            self._runs.pop(run_id.int, None)

    def _put(self, run_id: UUID, run: Run) -> None:
        with self._lock:
            self._runs[run_id.int] = run
            if len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)

    def tags(self, parent_run_id: UUID | None, metadata: Mapping[str, Any], fallback_run: str | None) -> dict[str, str]:
        """The tags of a call made by `parent_run_id`; `fallback_run` is the run where the outermost one was not seen.

        A call that stands alone, outside of any chain or graph, gets no run here: the guard gives it the process's.
        """
        parent = self._runs.get(parent_run_id.int) if parent_run_id is not None else None
        found = {
            "agent": metadata.get("lc_agent_name") or (parent and parent.agent),
            "node": metadata.get("langgraph_node"),
            "thread": metadata.get("thread_id"),
            "run": (parent and parent.outermost) or fallback_run,
            "parent_run": parent_run_id,
            "tool": parent and parent.tool,
        }
        return clean(found)


def is_resumed(inputs: Any) -> bool:
    """Whether the input of a graph resumes an unfinished run: None, or a Command."""
    return inputs is None or type(inputs).__name__ == "Command"


def clean(tags: Mapping[str, Any]) -> dict[str, str]:
    """The tags as the books take them: printable text of at most 512 characters; those without a value are left out."""
    cleaned = {}
    for name, value in tags.items():
        text = "" if value is None else str(value)
        if text:
            if not text.isprintable():
                text = "".join(sign if sign.isprintable() else "?" for sign in text)
            cleaned[name] = text[:_MAX_LENGTH]
    return cleaned
