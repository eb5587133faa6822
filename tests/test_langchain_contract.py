"""The contract of adapters, through LangChain's handler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from bursar import Bursar
from bursar.testing import AdapterContract
from bursar_langchain import BursarCallbackHandler, GuardedEmbeddings, install

pytest.importorskip("langchain_openai")


class TestLangChain(AdapterContract):
    """Installed for all calls of the process; embeddings, which have no callbacks, are wrapped."""

    bursar_installed: Bursar

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        self.bursar_installed = bursar
        handler = BursarCallbackHandler(
            bursar
        )  # of the same guard: it waits for calls whose end comes in the background
        uninstall = install(bursar)
        try:
            yield
        finally:
            handler.drain(10)
            uninstall()

    def chat(
        self, url: str, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0, **options: Any
    ) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model="gpt-4o",
            base_url=f"{url}/v1",
            api_key="any",
            max_tokens=max_tokens,
            timeout=timeout_s,
            max_retries=retries,
            n=n,
            **options,
        )

    def call(self, url: str, prompt: str, **options: Any) -> Any:
        return self.chat(url, **options).invoke(prompt)

    async def acall(self, url: str, prompt: str, **options: Any) -> Any:
        from openai import DefaultAsyncHttpxClient

        # LangChain keeps one async client per process, and that does not outlive its event loop
        async with DefaultAsyncHttpxClient() as client:
            return await self.chat(url, http_async_client=client, **options).ainvoke(prompt)

    def stream(self, url: str, prompt: str, **options: Any) -> Iterator[Any]:
        yield from self.chat(url, stream_usage=True, **options).stream(prompt)

    async def astream(self, url: str, prompt: str, **options: Any) -> AsyncIterator[Any]:
        async for chunk in self.chat(url, stream_usage=True, **options).astream(prompt):
            yield chunk

    def agent(self, url: str, prompt: str, tool: Callable[[str], str]) -> Any:
        from langchain.agents import create_agent
        from langchain_core.tools import StructuredTool

        def search(query: str) -> str:
            """Search."""
            return tool(query)

        agent = create_agent(self.chat(url), [StructuredTool.from_function(search)], name="planner")
        return agent.invoke({"messages": [("user", prompt)]}, config={"recursion_limit": 200})

    def cached(self, url: str, prompt: str) -> Any:
        from langchain_core.caches import InMemoryCache

        model = self.chat(url, cache=InMemoryCache())
        return [model.invoke(prompt) for _ in range(2)]

    def fall_back(self, url: str, prompt: str) -> Any:
        return self.chat(url).with_fallbacks([self.chat(url, temperature=0)]).invoke(prompt)

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        from langchain_openai import OpenAIEmbeddings

        plain = OpenAIEmbeddings(
            model="text-embedding-3-small",
            base_url=f"{url}/v1",
            api_key="any",
            check_embedding_ctx_length=False,
            max_retries=0,
        )
        guarded = GuardedEmbeddings(plain, self.bursar_installed, provider="openai", model="text-embedding-3-small")
        return guarded.embed_documents(list(texts))
