"""Embeddings within budgets: LangChain gives them no callbacks, so they are wrapped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.embeddings import Embeddings

from bursar.errors import BudgetExceeded
from bursar_langchain.errors import langchain_error

if TYPE_CHECKING:
    from bursar import Bursar

Texts = TypeVar("Texts", str, list[str])
Vectors = TypeVar("Vectors")
_NO_USAGE = "LangChain's embeddings state no usage"


class GuardedEmbeddings(Embeddings):
    """The given embeddings, each call reserved before it is sent, and booked at the reserved amount as estimated.

    `provider` and `model` decide the price; `tags` are added to every call. Raises LangChainBudgetExceeded, and the other
    errors of `Bursar.reserve`.
    """

    def __init__(self, embeddings: Embeddings, bursar: Bursar, *, provider: str, model: str, **tags: str) -> None:
        self.embeddings = embeddings
        self._bursar = bursar
        self._call: dict[str, Any] = {
            "provider": provider,
            "model": model,
            "endpoint": "embeddings",
            "changeable": (),
            "default_tags": tags,
        }

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._guarded(self.embeddings.embed_documents, texts) if texts else []

    def embed_query(self, text: str) -> list[float]:
        return self._guarded(self.embeddings.embed_query, text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self._aguarded(self.embeddings.aembed_documents, texts) if texts else []

    async def aembed_query(self, text: str) -> list[float]:
        return await self._aguarded(self.embeddings.aembed_query, text)

    def _guarded(self, embed: Callable[[Texts], Vectors], given: Texts) -> Vectors:
        try:
            with self._bursar.call(messages=given, **self._call) as call:
                vectors = embed(given)
                call.settle_unknown(_NO_USAGE)
                return vectors
        except BudgetExceeded as error:
            raise langchain_error(error) from error

    async def _aguarded(self, embed: Callable[[Texts], Awaitable[Vectors]], given: Texts) -> Vectors:
        try:
            async with self._bursar.acall(messages=given, **self._call) as call:
                vectors = await embed(given)
                await call.asettle_unknown(_NO_USAGE)
                return vectors
        except BudgetExceeded as error:
            raise langchain_error(error) from error
