"""LiteLLM keeps the contract of adapters, through the functions of the module and through its Router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

litellm = pytest.importorskip("litellm")

from bursar import Bursar  # noqa: E402 - LiteLLM may not be there
from bursar.testing import AdapterContract  # noqa: E402
from bursar_litellm import BursarLogger, install  # noqa: E402


def options(url: str, prompt: str, **more: Any) -> dict[str, Any]:
    retries, timeout_s = more.pop("retries", 0), more.pop("timeout_s", 30)
    return {
        "model": "openai/gpt-4o",
        "messages": [{"role": "user", "content": prompt}],
        "api_base": f"{url}/v1",
        "api_key": "any",
        "max_retries": retries,
        "timeout": timeout_s,
        **more,
    }


class TestFunctions(AdapterContract):
    lacks = frozenset({"agent"})

    @contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        uninstall = install(bursar)
        try:
            yield
        finally:
            uninstall()
            assert BursarLogger(bursar).drain()

    def call(self, url: str, prompt: str, **more: Any) -> Any:
        return litellm.completion(**options(url, prompt, **more))

    async def acall(self, url: str, prompt: str, **more: Any) -> Any:
        return await litellm.acompletion(**options(url, prompt, **more))

    def stream(self, url: str, prompt: str, **more: Any) -> Iterator[Any]:
        return litellm.completion(**options(url, prompt, **more), stream=True)

    async def astream(self, url: str, prompt: str, **more: Any) -> AsyncIterator[Any]:
        async for chunk in await litellm.acompletion(**options(url, prompt, **more), stream=True):
            yield chunk

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        return litellm.embedding(
            model="text-embedding-3-small", input=list(texts), api_base=f"{url}/v1", api_key="any", max_retries=0
        )


class TestRouter(TestFunctions):
    """The same through a Router with one deployment."""

    def router(self, url: str, **more: Any) -> Any:
        deployment = {"model": "openai/gpt-4o", "api_base": f"{url}/v1", "api_key": "any"}
        return litellm.Router([{"model_name": "main", "litellm_params": deployment}], num_retries=0)

    def call(self, url: str, prompt: str, **more: Any) -> Any:
        return self.router(url).completion(**{**options(url, prompt, **more), "model": "main"})

    async def acall(self, url: str, prompt: str, **more: Any) -> Any:
        return await self.router(url).acompletion(**{**options(url, prompt, **more), "model": "main"})

    def stream(self, url: str, prompt: str, **more: Any) -> Iterator[Any]:
        return self.router(url).completion(**{**options(url, prompt, **more), "model": "main"}, stream=True)

    async def astream(self, url: str, prompt: str, **more: Any) -> AsyncIterator[Any]:
        settings = {**options(url, prompt, **more), "model": "main"}
        async for chunk in await self.router(url).acompletion(**settings, stream=True):
            yield chunk
