"""Wrapped clients of OpenAI and Anthropic keep the contract of adapters."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anthropic
import openai

from bursar import Bursar
from bursar.testing import AdapterContract
from bursar.wrap.construct import guard_new_clients


class TestOpenAI(AdapterContract):
    """The client of OpenAI."""

    lacks = frozenset({"agent", "cache", "fallback"})

    @contextlib.contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        self.bursar = bursar
        yield

    def client(self, url: str, timeout_s: float = 30, retries: int = 0) -> openai.OpenAI:
        return self.bursar.wrap(
            openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=timeout_s, max_retries=retries)
        )

    def aclient(self, url: str, timeout_s: float = 30, retries: int = 0) -> openai.AsyncOpenAI:
        return self.bursar.wrap(
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=timeout_s, max_retries=retries)
        )

    def asked(self, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": "gpt-4o", "messages": messages, "max_completion_tokens": max_tokens, **more}

    def call(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        with self.client(url, timeout_s, retries) as client:
            return client.chat.completions.create(**self.asked(prompt, max_tokens, n=n))

    async def acall(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        async with self.aclient(url, timeout_s, retries) as client:
            return await client.chat.completions.create(**self.asked(prompt, max_tokens, n=n))

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        yield from self.client(url, timeout_s).chat.completions.create(**self.asked(prompt, max_tokens, stream=True))

    async def astream(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30
    ) -> AsyncIterator[Any]:
        asked = self.asked(prompt, max_tokens, stream=True)
        async for chunk in await self.aclient(url, timeout_s).chat.completions.create(**asked):
            yield chunk

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        return self.client(url).embeddings.create(model="text-embedding-3-small", input=list(texts))


class TestNewClients(TestOpenAI):
    """Clients that the program makes for itself, as `bursar run` guards them."""

    @contextlib.contextmanager
    def install(self, bursar: Bursar) -> Iterator[None]:
        end = guard_new_clients(bursar, openai)
        yield
        end()
        assert type(self.client("http://localhost")) is openai.OpenAI

    def client(self, url: str, timeout_s: float = 30, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=timeout_s, max_retries=retries)

    def aclient(self, url: str, timeout_s: float = 30, retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=timeout_s, max_retries=retries)


class TestResponses(TestOpenAI):
    """The same through the responses API."""

    lacks = TestOpenAI.lacks | {"n", "embed"}

    def asked(self, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        more.pop("n", None)
        return {"model": "gpt-4o", "input": prompt, "max_output_tokens": max_tokens, **more}

    def call(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, **more: Any) -> Any:
        with self.client(url, timeout_s, more.get("retries", 0)) as client:
            return client.responses.create(**self.asked(prompt, max_tokens))

    async def acall(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, **more: Any) -> Any:
        async with self.aclient(url, timeout_s, more.get("retries", 0)) as client:
            return await client.responses.create(**self.asked(prompt, max_tokens))

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        yield from self.client(url, timeout_s).responses.create(**self.asked(prompt, max_tokens, stream=True))

    async def astream(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30
    ) -> AsyncIterator[Any]:
        asked = self.asked(prompt, max_tokens, stream=True)
        async for event in await self.aclient(url, timeout_s).responses.create(**asked):
            yield event


class TestAnthropic(TestOpenAI):
    """The client of Anthropic. The contract's model is gpt-4o: any provider may sell it in Anthropic's wire format."""

    lacks = TestOpenAI.lacks | {"n", "embed"}

    def messages(self, url: str, timeout_s: float = 30, retries: int = 0) -> anthropic.Anthropic:
        plain = anthropic.Anthropic(base_url=url, api_key="any", timeout=timeout_s, max_retries=retries)
        return self.bursar.wrap(plain, provider="openai")

    def amessages(self, url: str, timeout_s: float = 30, retries: int = 0) -> anthropic.AsyncAnthropic:
        plain = anthropic.AsyncAnthropic(base_url=url, api_key="any", timeout=timeout_s, max_retries=retries)
        return self.bursar.wrap(plain, provider="openai")

    def asked(self, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": "gpt-4o", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, **more}

    def call(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, **more: Any) -> Any:
        with self.messages(url, timeout_s, more.get("retries", 0)) as client:
            return client.messages.create(**self.asked(prompt, max_tokens))

    async def acall(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, **more: Any) -> Any:
        async with self.amessages(url, timeout_s, more.get("retries", 0)) as client:
            return await client.messages.create(**self.asked(prompt, max_tokens))

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        yield from self.messages(url, timeout_s).messages.create(**self.asked(prompt, max_tokens, stream=True))

    async def astream(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30
    ) -> AsyncIterator[Any]:
        asked = self.asked(prompt, max_tokens, stream=True)
        async for event in await self.amessages(url, timeout_s).messages.create(**asked):
            yield event


class TestAnthropicHelper(TestAnthropic):
    """Anthropic's helper for streams, `messages.stream`."""

    lacks = TestAnthropic.lacks | {"call", "acall", "retries"}

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        with self.messages(url, timeout_s).messages.stream(**self.asked(prompt, max_tokens)) as stream:
            yield from stream

    async def astream(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30
    ) -> AsyncIterator[Any]:
        async with self.amessages(url, timeout_s).messages.stream(**self.asked(prompt, max_tokens)) as stream:
            async for event in stream:
                yield event
