"""`bursar demo`: real LangChain agents over HTTP, stopped at their budgets, and the books that prove it."""

from __future__ import annotations

from bursar_langchain.demo.command import command

__all__ = ["command"]
