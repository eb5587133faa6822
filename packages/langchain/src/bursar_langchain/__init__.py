"""Bursar for LangChain and LangGraph: budgets that hold before a call is sent, by one callback handler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bursar_langchain.embeddings import GuardedEmbeddings
from bursar_langchain.errors import LangChainBudgetExceeded
from bursar_langchain.handler import BursarCallbackHandler
from bursar_langchain.install import install

if TYPE_CHECKING:
    from bursar_langchain.middleware import BursarMiddleware

__all__ = ["BursarCallbackHandler", "BursarMiddleware", "install", "GuardedEmbeddings", "LangChainBudgetExceeded"]


def __getattr__(name: str) -> Any:
    if name != "BursarMiddleware":
        raise AttributeError(f"module 'bursar_langchain' has no attribute {name!r}")
    # The middleware needs langchain itself, which takes a second to import; the handler works without it.
    from bursar_langchain.middleware import BursarMiddleware

    return BursarMiddleware
