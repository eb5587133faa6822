"""Guarding without touching the code that calls: LangChain asks these variables for further handlers at every call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from bursar.errors import InvalidInput
from bursar_langchain.handler import BursarCallbackHandler

if TYPE_CHECKING:
    from bursar import Bursar


class _Installed:
    """Has the form of a ContextVar, and one value in all threads: plain threads do not inherit context variables."""

    handler: BursarCallbackHandler | None = None

    def get(self) -> BursarCallbackHandler | None:
        return self.handler


_installed = _Installed()
# The handler of the middleware that a call is inside of.
active: ContextVar[BursarCallbackHandler | None] = ContextVar("bursar_langchain_handler", default=None)
_lock = threading.Lock()
_hooked = False


def hook() -> None:
    """Have LangChain ask for our handlers, from now on."""
    global _hooked
    from langchain_core.tracers.context import register_configure_hook  # half a second to import

    with _lock:
        if not _hooked:
            register_configure_hook(active, inheritable=True)
            register_configure_hook(cast("ContextVar[Any]", _installed), inheritable=True)
            _hooked = True


def install(bursar: Bursar, **tags: str) -> Callable[[], None]:
    """Guard every LangChain call of this process, in all threads, with no other change. Returns what uninstalls it.

    `tags` are added to every call. Raises InvalidInput while another guard is installed.
    """
    hook()
    handler = BursarCallbackHandler(bursar, **tags)
    with _lock:
        if _installed.handler is not None and _installed.handler.bursar is not bursar:
            raise InvalidInput("Another guard is installed already. Uninstall it first.", argument="bursar")
        _installed.handler = handler

    def uninstall() -> None:
        with _lock:
            if _installed.handler is handler:
                _installed.handler = None

    return uninstall


def guards(module: str) -> bool:
    """Whether calls by clients that this module of LangChain makes are seen: those of models are, embeddings' are not."""
    return module.startswith("langchain") and (".chat_models" in module or ".llms" in module)
