"""Which provider a client talks to: told by its class, by the host of its base URL, or by the SDK it comes from."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import urlsplit

# A host, or the end of one, -> the provider's name in the price book.
_HOSTS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "openai.azure.com": "azure",
    "cognitiveservices.azure.com": "azure",
    "services.ai.azure.com": "azure",
    "openrouter.ai": "openrouter",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "xai",
    "api.together.xyz": "together",
    "api.together.ai": "together",
    "api.mistral.ai": "mistral",
    "api.fireworks.ai": "fireworks",
    "api.cerebras.ai": "cerebras",
    "api.perplexity.ai": "perplexity",
    "api.cohere.com": "cohere",
    "api.cohere.ai": "cohere",
    "api.moonshot.ai": "moonshotai",
    "api.moonshot.cn": "moonshotai",
    "api.z.ai": "zai",
    "api.novita.ai": "novita",
    "api.sambanova.ai": "sambanova",
    "api.deepinfra.com": "deepinfra",
    "api.voyageai.com": "voyageai",
    "ai-gateway.vercel.sh": "vercel",
    "generativelanguage.googleapis.com": "google",
    "aiplatform.googleapis.com": "vertex",
}
# Part of a client's class name -> the provider: these clients work out their hosts from a region or a resource.
_CLASSES = {"Azure": "azure", "Foundry": "azure", "Bedrock": "bedrock", "Vertex": "vertex", "GoogleCloud": "vertex"}


@lru_cache(maxsize=1_024)
def provider_of(kind: type, base_url: str) -> str:
    """The provider behind a client class and its base URL.

    On loopback, and on hosts that are not known, it is the SDK's own: `openai` for the client of the package openai.
    """
    for one in kind.__mro__:
        for part, provider in _CLASSES.items():
            if part in one.__name__:
                return provider
    host = urlsplit(base_url).hostname or ""
    if host.startswith("bedrock") and ".amazonaws.com" in host:
        return "bedrock"
    if host.endswith("-aiplatform.googleapis.com"):
        return "vertex"
    labels = host.split(".")
    for start in range(len(labels)):
        provider = _HOSTS.get(".".join(labels[start:]), "")
        if provider:
            return provider
    # the class that the SDK defines, not a subclass in the user's own module
    sdk = next(one for one in reversed(kind.__mro__) if hasattr(one, "copy"))
    return sdk.__module__.partition(".")[0]
