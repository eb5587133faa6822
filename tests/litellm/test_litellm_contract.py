"""LiteLLM keeps the contract of adapters, through the functions of the module and through its Router."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import litellm

from bursar import Bursar
from bursar.testing import AdapterContract
from bursar_litellm import BursarLogger, install


def options(
    url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0, **more: Any
) -> dict[str, Any]:
    return {
        "model": "openai/gpt-4o",
        "messages": [{"role": "user", "content": prompt}],
        "api_base": f"{url}/v1",
        "api_key": "any",
        "max_tokens": max_tokens,
        "max_retries": retries,
        "timeout": timeout_s,
        **({"n": n} if n > 1 else {}),
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

    def cached(self, url: str, prompt: str) -> Any:
        litellm.cache = litellm.Cache()
        try:
            return [self.call(url, prompt, caching=True) for _ in range(2)]
        finally:
            litellm.cache = None

    def fall_back(self, url: str, prompt: str) -> Any:
        second = {"model": "openai/gpt-4o", "api_base": f"{url}/v1"}
        return litellm.completion(**options(url, prompt), fallbacks=[second])

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        return litellm.embedding(
            model="text-embedding-3-small", input=list(texts), api_base=f"{url}/v1", api_key="any", max_retries=0
        )


class TestRouter(TestFunctions):
    """The same through a Router with one deployment, whose retries are the Router's."""

    def router(self, url: str, prompt: str, *, retries: int = 0, **more: Any) -> tuple[Any, dict[str, Any]]:
        deployment = {"model": "openai/gpt-4o", "api_base": f"{url}/v1", "api_key": "any"}
        models = [{"model_name": name, "litellm_params": deployment} for name in ("main", "second")]
        settings = {**options(url, prompt, **more), "model": "main"}
        for name in ("api_base", "api_key", "max_retries"):
            del settings[name]
        with _lock:
            key = (url, retries)
            if key not in _routers:
                _routers[key] = litellm.Router(models, num_retries=retries, retry_after=0, disable_cooldowns=True)
        return _routers[key], settings

    def call(self, url: str, prompt: str, **more: Any) -> Any:
        router, settings = self.router(url, prompt, **more)
        return router.completion(**settings)

    def fall_back(self, url: str, prompt: str) -> Any:
        router, settings = self.router(url, prompt)
        return router.completion(**settings, fallbacks=[{"main": ["second"]}])

    async def acall(self, url: str, prompt: str, **more: Any) -> Any:
        router, settings = self.router(url, prompt, **more)
        return await router.acompletion(**settings)

    def stream(self, url: str, prompt: str, **more: Any) -> Iterator[Any]:
        router, settings = self.router(url, prompt, **more)
        return router.completion(**settings, stream=True)

    async def astream(self, url: str, prompt: str, **more: Any) -> AsyncIterator[Any]:
        router, settings = self.router(url, prompt, **more)
        async for chunk in await router.acompletion(**settings, stream=True):
            yield chunk


_lock = threading.Lock()
_routers: dict[tuple[str, int], Any] = {}
