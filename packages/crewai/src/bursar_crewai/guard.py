"""The guard that crews, flows and agents are given, and the one that holds for a whole process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from bursar.errors import InvalidInput
from bursar_crewai.frames import clean, current, inside

if TYPE_CHECKING:
    from bursar import Bursar

Subject = TypeVar("Subject")
Embedder = TypeVar("Embedder", bound=Callable[..., Any])


class BursarCrew:
    """Holds every model, embedding and tool call of the crews, flows and agents it is given against the budgets of `bursar`.

    Give it to a crew or an agent as `Crew(..., step_callback=guard.step_callback)` or by `guard.attach(...)`, to any block of
    code by `with guard.scope():`, or to the whole process by `install(bursar)`. `tags` are added to all calls; a scope's own
    tags win over them. What runs inside (tasks, tools, planning, memory, nested crews, CrewAI's threads) is held too. A
    refusal reaches the caller of `kickoff` as CrewBudgetExceeded; nothing was sent then. Raises InvalidInput where this
    release of CrewAI cannot be guarded.
    """

    def __init__(self, bursar: Bursar, **tags: str) -> None:
        from bursar_crewai.seams import open_seams  # what CrewAI calls there asks this module whose budgets hold

        open_seams()
        self.bursar = bursar
        self.tags = clean(tags)

    def step_callback(self, step: object = None) -> None:
        """What marks a crew or an agent as guarded. It also raises a refusal that CrewAI swallowed, if there was one."""
        frame = current()
        if frame is not None:
            frame.raise_refusal()

    def attach(self, subject: Subject) -> Subject:
        """Guard this Crew, Agent or Flow, from its next call on. A step callback that it has goes on being called."""
        if hasattr(subject, "step_callback"):
            previous = subject.step_callback
            if guard_of(subject) is not self:
                subject.step_callback = self.step_callback if previous is None else partial(self._both, previous)
        else:
            key = id(subject)
            _flows[key] = self
            weakref.finalize(subject, _flows.pop, key, None)
        return subject

    @contextmanager
    def scope(self, **tags: str) -> Iterator[None]:
        """Guard every call inside the block, of this thread or task and what CrewAI starts from it, with more tags."""
        with inside(self, None, **tags):
            yield

    def embedder(self, function: Embedder, *, provider: str, model: str) -> Embedder:
        """Guard an embedding function of your own, for `Memory(embedder=...)`: `provider` and `model` decide its price."""
        from bursar_crewai.embeddings import guarded_embedder

        return guarded_embedder(function, provider, model)  # type: ignore[return-value]

    def _both(self, previous: Callable[[Any], Any], step: Any) -> None:
        previous(step)
        self.step_callback(step)


_flows: dict[int, BursarCrew] = {}
_lock = threading.Lock()
_installed: BursarCrew | None = None


def install(bursar: Bursar, **tags: str) -> Callable[[], None]:
    """Guard every CrewAI call of this process, in all threads, with no other change. Returns what uninstalls it.

    `tags` are added to every call. Raises InvalidInput while another guard is installed.
    """
    global _installed
    guard = BursarCrew(bursar, **tags)
    with _lock:
        if _installed is not None and _installed.bursar is not bursar:
            raise InvalidInput("Another guard is installed already. Uninstall it first.", argument="bursar")
        _installed = guard

    def uninstall() -> None:
        global _installed
        with _lock:
            if _installed is guard:
                _installed = None

    return uninstall


def guards(module: str) -> bool:
    """Whether the SDK clients that this module makes are guarded here: CrewAI's own, and those of its embedding functions."""
    return module.partition(".")[0] in ("crewai", "chromadb")


def guard_of(subject: Any) -> BursarCrew | None:
    """The guard that this crew, agent or flow was given."""
    callback = getattr(subject, "step_callback", None)
    if isinstance(callback, partial):
        callback = callback.func
    owner = getattr(callback, "__self__", None)
    return owner if isinstance(owner, BursarCrew) else _flows.get(id(subject))


def guard_here(agent: object = None) -> BursarCrew | None:
    """The guard of what is under way around, else the agent's, else the process's."""
    frame = current()
    if frame is not None:
        return frame.guard
    return (guard_of(agent) if agent is not None else None) or _installed
