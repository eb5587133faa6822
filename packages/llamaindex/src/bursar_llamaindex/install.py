"""Guarding without touching the code that calls: every LLM and embedding model gets its gate just before its first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bursar.ending import drain
from bursar.errors import InvalidInput
from bursar_llamaindex.handler import BursarCallbackHandler, forget, installed

if TYPE_CHECKING:
    from bursar import Bursar


def install(bursar: Bursar, **tags: str) -> Callable[[], None]:
    """Guard every LLM and embedding model of this process, whenever created, with no other change. Returns what uninstalls it.

    `tags` are added to every call. Uninstalling waits for abandoned streams to be booked. Raises InvalidInput while
    another guard is installed.
    """
    if installed and installed[0].bursar is not bursar:
        raise InvalidInput("Another guard is installed already. Uninstall it first.", argument="bursar")
    for earlier in installed:
        forget(earlier)
    handler = BursarCallbackHandler(bursar, **tags)
    installed[:] = [handler]

    def uninstall() -> None:
        if handler in installed:
            installed.remove(handler)
        forget(handler)
        drain(timeout_s=10.0)

    return uninstall


def guards(module: str) -> bool:
    """Whether the clients that this module of LlamaIndex makes are guarded here: readers and rerankers, for two, are not."""
    return module.startswith(("llama_index.llms.", "llama_index.embeddings."))
