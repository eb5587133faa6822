"""Bursar for LlamaIndex: budgets that hold before a call is sent, for every LLM and embedding model, by one call."""

from __future__ import annotations

from bursar_llamaindex.handler import BursarCallbackHandler
from bursar_llamaindex.install import install
from bursar_llamaindex.llm import guard_llm
from bursar_llamaindex.tool import guard_tool

__all__ = ["install", "BursarCallbackHandler", "guard_llm", "guard_tool"]
