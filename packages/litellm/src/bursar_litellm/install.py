"""Guarding without touching the code that calls: a logger in every list of callbacks that LiteLLM keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import litellm

from bursar.errors import InvalidInput
from bursar_litellm.logger import BursarLogger

if TYPE_CHECKING:
    from bursar import Bursar

# In all of them, because other libraries replace the first: CrewAI does so at every call.
_LISTS = ("callbacks", "input_callback", "success_callback", "failure_callback")
# LiteLLM copies the callbacks into these.
_COPIES = ("_async_input_callback", "_async_success_callback", "_async_failure_callback")
_lock = threading.Lock()
_installed: list[BursarLogger] = []


def install(bursar: Bursar, **tags: str) -> Callable[[], None]:
    """Guard every LiteLLM call of this process, in all threads, with no other change. Returns what uninstalls it.

    `tags` are added to every call. Raises InvalidInput while another guard is installed.
    """
    with _lock:
        if any(logger.bursar is not bursar for logger in _installed):
            raise InvalidInput("Another guard is installed already. Uninstall it first.", argument="bursar")
        logger = BursarLogger(bursar, **tags)
        _installed.append(logger)
        for name in _LISTS:
            getattr(litellm, name).append(logger)

    def uninstall() -> None:
        with _lock:
            if logger in _installed:
                _installed.remove(logger)
            for name in (*_LISTS, *_COPIES):
                callbacks = getattr(litellm, name, [])
                while logger in callbacks:
                    callbacks.remove(logger)

    return uninstall
