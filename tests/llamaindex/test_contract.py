"""The contract of adapters, passed by LlamaIndex's own clients, agents and embeddings over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from bursar import Bursar
from bursar.testing import AdapterContract
from bursar_llamaindex import BursarCallbackHandler, guard_llm, guard_tool, install


class TestInstalled(AdapterContract):
    """With `install`: LLMs that know nothing of Bursar."""

    lacks = frozenset({"cache", "fallback"})
    bursar: Bursar

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        self.bursar = bursar
        uninstall = install(bursar)
        try:
            yield
        finally:
            uninstall()

    def llm(self, url: str, *, max_tokens: int = 500, timeout_s: float = 30, retries: int = 0) -> Any:
        settings = {"api_base": f"{url}/v1", "api_key": "replayed", "max_retries": retries, "timeout": timeout_s}
        return OpenAI(model="gpt-4o", max_tokens=max_tokens, **settings)

    def call(self, url: str, prompt: str, *, n: int = 1, **options: Any) -> Any:
        return self.llm(url, **options).complete(prompt, **({"n": n} if n > 1 else {}))

    async def acall(self, url: str, prompt: str, *, n: int = 1, **options: Any) -> Any:
        return await self.llm(url, **options).achat([ChatMessage(role="user", content=prompt)])

    def stream(self, url: str, prompt: str, **options: Any) -> Iterator[Any]:
        return self.llm(url, **options).stream_chat([ChatMessage(role="user", content=prompt)])

    async def astream(self, url: str, prompt: str, **options: Any) -> AsyncIterator[Any]:
        parts = await self.llm(url, **options).astream_complete(prompt)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    def agent(self, url: str, prompt: str, tool: Callable[[str], str]) -> Any:
        def search(query: str) -> str:
            """Search."""
            return tool(query)

        agent = FunctionAgent(name="planner", llm=self.llm(url), tools=[guard_tool(search, self.bursar)])

        async def run() -> Any:
            return await agent.run(prompt, max_iterations=40)

        return asyncio.run(run())

    def embeddings(self, url: str) -> Any:
        settings = {"api_base": f"{url}/v1", "api_key": "replayed", "max_retries": 0}
        return OpenAIEmbedding(model="text-embedding-3-small", **settings)

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        return self.embeddings(url).get_text_embedding_batch(list(texts))


@pytest.mark.nightly
class TestHandler(TestInstalled):
    """With a handler in the callback manager of each object: the same gate, which is wired there and not found by itself."""

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        self.bursar = bursar
        self.handler = BursarCallbackHandler(bursar)
        yield
        assert self.handler.drain()

    def llm(self, url: str, **options: Any) -> Any:
        llm = super().llm(url, **options)
        llm.callback_manager = CallbackManager([self.handler])
        return llm

    def embeddings(self, url: str) -> Any:
        embeddings = super().embeddings(url)
        embeddings.callback_manager = CallbackManager([self.handler])
        return embeddings


class TestGuarded(TestInstalled):
    """With copies made by `guard_llm`; embeddings have no such copy."""

    lacks = TestInstalled.lacks | {"embed"}

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        self.bursar = bursar
        yield
        assert BursarCallbackHandler(bursar).drain()

    def llm(self, url: str, **options: Any) -> Any:
        return guard_llm(super().llm(url, **options), self.bursar)
