"""The contract of adapters, passed by CrewAI's own clients, crews and embeddings over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool as as_tool

from bursar import Bursar
from bursar.testing import AdapterContract
from bursar_crewai import install


def client(url: str, *, retries: int = 0, timeout_s: float = 30, n: int = 1, **options: Any) -> Any:
    """CrewAI's native OpenAI client."""
    extra = {"additional_params": {"n": n}} if n > 1 else {}
    settings = {"base_url": f"{url}/v1", "api_key": "replayed", "max_retries": retries, "timeout": timeout_s}
    return LLM(model="gpt-4o", **settings, **extra, **options)


def crew(llm: Any, prompt: str, *tools: Any, **options: Any) -> Any:
    """One agent named `planner` with one task."""
    planner = Agent(role="planner", goal="g", backstory="b", llm=llm, tools=list(tools), max_retry_limit=0)
    task = Task(description=prompt, expected_output="an answer", agent=planner)
    return Crew(agents=[planner], tasks=[task], **options)


class TestCrewAI(AdapterContract):
    """Calls and tasks by the LLM object, streams and agents by crews."""

    lacks = frozenset({"cache", "fallback"})

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        uninstall = install(bursar)
        try:
            yield
        finally:
            uninstall()

    def call(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        return client(url, retries=retries, timeout_s=timeout_s, n=n, max_tokens=max_tokens).call(prompt)

    async def acall(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        return await client(url, retries=retries, timeout_s=timeout_s, n=n, max_tokens=max_tokens).acall(prompt)

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        llm = client(url, timeout_s=timeout_s, max_tokens=max_tokens)
        output = crew(llm, prompt, stream=True).kickoff()
        try:
            yield from output
        finally:
            output.close()  # it waits for CrewAI's thread, which goes on reading

    async def astream(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30
    ) -> AsyncIterator[Any]:
        llm = client(url, timeout_s=timeout_s, max_tokens=max_tokens)
        output = await crew(llm, prompt, stream=True).akickoff()
        try:
            async for chunk in output:
                yield chunk
        finally:
            await output.aclose()

    def agent(self, url: str, prompt: str, tool: Callable[[str], str]) -> Any:
        def search(query: str) -> str:
            """Search."""
            return tool(query)

        return crew(client(url, max_tokens=500), prompt, as_tool("search")(search)).kickoff()

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        from crewai.rag.embeddings.factory import build_embedder

        config = {"api_key": "replayed", "api_base": f"{url}/v1", "model_name": "text-embedding-3-small"}
        return build_embedder({"provider": "openai", "config": config})(list(texts))
