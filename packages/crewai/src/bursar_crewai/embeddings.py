"""Embeddings of memory and knowledge: CrewAI announces them by no event, so its embedding functions are wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from bursar_crewai.calls import note_answer, run
from bursar_crewai.errors import CrewBudgetExceeded
from bursar_crewai.frames import current
from bursar_crewai.guard import guard_here

# The embedding functions that CrewAI builds and that cost money, and who bills them. Models that run in this process
# (ONNX, sentence transformers, Instructor, OpenCLIP, Text2Vec) and Ollama cost nothing per call.
_BILLED = {
    "OpenAIEmbeddingFunction": "openai",
    "AmazonBedrockEmbeddingFunction": "bedrock",
    "CohereEmbeddingFunction": "cohere",
    "GoogleGenerativeAiEmbeddingFunction": "google",
    "GoogleGenAIVertexEmbeddingFunction": "vertex",
    "HuggingFaceEmbeddingFunction": "huggingface",
    "JinaEmbeddingFunction": "jina",
    "RoboflowEmbeddingFunction": "roboflow",
    "VoyageAIEmbeddingFunction": "voyageai",
    "WatsonXEmbeddingFunction": "watsonx",
    "OracleEmbeddingFunction": "oracle",
}
_GUARDED = "_bursar_guarded"


def guard_embedder(embedder: Any) -> Any:
    """Have the class of this embedding function ask for a budget, from its next call on; the function itself."""
    kind = type(embedder)
    if kind.__name__ in _BILLED and _GUARDED not in kind.__dict__:
        original = kind.__call__

        @wraps(original)
        def call(self: Any, input: Any) -> Any:
            provider, model = _provider(self), _model(self)
            return _embed(lambda used, texts: original(used, texts), self, input, provider, model)

        kind.__call__ = call
        setattr(kind, _GUARDED, True)
    return embedder


def guarded_embedder(function: Callable[..., Any], provider: str, model: str) -> Callable[..., Any]:
    """The user's own embedding function, within budgets. It states no usage, so what was reserved is booked as estimated."""

    def embed(input: Any) -> Any:
        return _embed(lambda used, texts: used(texts), function, input, provider, model)

    return embed


def _embed(send: Callable[[Any, Any], Any], function: Any, texts: Any, provider: str, model: str) -> Any:
    guard = guard_here()
    if guard is None or not texts:
        return send(function, texts)
    texts = [texts] if isinstance(texts, str) else list(texts)
    frame = current()
    said = {
        "provider": provider,
        "model": model,
        "messages": None,
        "body": {"model": model, "input": texts},
        "endpoint": "embeddings",
        "resize": False,
        "changeable": (),
        "default_tags": guard.tags if frame is None else frame.tags,
    }
    used = _observed(function)
    try:
        return run(guard.bursar, function, said, lambda _: send(used, texts))
    except CrewBudgetExceeded as refused:
        if frame is not None and frame.top is not None:
            frame.top.refusal = refused  # memory goes on without embeddings; the next call tells
        raise


def _observed(function: Any) -> Any:
    """A copy whose OpenAI client reports the usage of its answers, which the function drops."""
    client = getattr(function, "client", None)
    if not hasattr(getattr(client, "embeddings", None), "create"):
        return function
    observed = copy.copy(function)
    observed.client = _Observed(client, function)
    return observed


class _Observed:
    """Stands for an OpenAI client in one call of an embedding function."""

    def __init__(self, client: Any, function: Any) -> None:
        self._client, self._function = client, function
        self.embeddings = self

    def create(self, **params: Any) -> Any:
        response = self._client.embeddings.create(**params)
        note_answer(self._function, getattr(response, "usage", None))
        return response


def _provider(embedder: Any) -> str:
    """Who bills this embedder: OpenAI's function reaches Azure and OpenRouter too."""
    from bursar.prices import provider_of_url  # the price book loads with the first call, not with the import

    provider = _BILLED[type(embedder).__name__]
    if provider == "openai":
        if getattr(embedder, "api_type", None) == "azure":
            return "azure"
        return provider_of_url(str(getattr(embedder, "api_base", None) or "")) or provider
    return provider


def _model(embedder: Any) -> str:
    config = getattr(embedder, "_config", None)
    for holder in (embedder, config):
        for name in ("model_name", "model", "_model_name", "model_id"):
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, str) and value:
                return value
    return "unknown"
