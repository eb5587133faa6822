"""Bursar for LangChain and LangGraph: budgets that hold before a call is sent, by one callback handler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar_langchain.embeddings import GuardedEmbeddings
    from bursar_langchain.errors import LangChainBudgetExceeded
    from bursar_langchain.handler import BursarCallbackHandler
    from bursar_langchain.hooks import install
    from bursar_langchain.middleware import BursarMiddleware

# public name -> the module that holds it; it loads when the name is first used: langchain alone takes a second to import
_HOMES = {
    "BursarCallbackHandler": "handler",
    "BursarMiddleware": "middleware",
    "install": "hooks",
    "GuardedEmbeddings": "embeddings",
    "LangChainBudgetExceeded": "errors",
}

__all__ = ["BursarCallbackHandler", "BursarMiddleware", "install", "GuardedEmbeddings", "LangChainBudgetExceeded"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bursar_langchain' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bursar_langchain.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
