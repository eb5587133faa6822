"""Bursar for LlamaIndex: budgets that hold before a call is sent, for every LLM and embedding, by one call."""

from __future__ import annotations

from bursar_llamaindex.handler import BursarCallbackHandler
from bursar_llamaindex.install import install

__all__ = ["install", "BursarCallbackHandler", "guard_llm", "guard_tool"]
