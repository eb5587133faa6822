"""The example adapter keeps the contract, as docs/adapters.md shows it to whoever writes one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bursar import Bursar
from bursar.testing import AdapterContract

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/own_adapter"))

import tiny_adapter


class TestTiny(AdapterContract):
    """A client without async calls, agents, embeddings, retries, a cache or fallbacks."""

    lacks = frozenset({"acall", "astream", "agent", "embed", "retries", "cache", "fallback"})

    def install(self, bursar: Bursar) -> AbstractContextManager[Any]:
        return tiny_adapter.install(bursar)

    def call(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        return tiny_adapter.Tiny(url, timeout_s).chat(prompt, max_completion_tokens=max_tokens, n=n)

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        return tiny_adapter.Tiny(url, timeout_s).stream(prompt, max_completion_tokens=max_tokens)
