"""Hosts: who bills the calls that go to a base URL, and the region that serves them."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import urlsplit

# The end of a host's name -> the provider's name in the price book. Clouds' customers have names under the same domain
# (cloudapp.azure.com), so only the ends that serve models stand here.
_HOSTS = {
    "openai.com": "openai",
    "anthropic.com": "anthropic",
    "openai.azure.com": "azure",
    "cognitiveservices.azure.com": "azure",
    "ai.azure.com": "azure",
    "openrouter.ai": "openrouter",
    "groq.com": "groq",
    "deepseek.com": "deepseek",
    "x.ai": "xai",
    "together.xyz": "together",
    "together.ai": "together",
    "mistral.ai": "mistral",
    "fireworks.ai": "fireworks",
    "cerebras.ai": "cerebras",
    "perplexity.ai": "perplexity",
    "cohere.com": "cohere",
    "cohere.ai": "cohere",
    "moonshot.ai": "moonshotai",
    "moonshot.cn": "moonshotai",
    "z.ai": "zai",
    "novita.ai": "novita",
    "sambanova.ai": "sambanova",
    "deepinfra.com": "deepinfra",
    "voyageai.com": "voyageai",
    "ai-gateway.vercel.sh": "vercel",
    "generativelanguage.googleapis.com": "google",
    "aiplatform.googleapis.com": "vertex",
}


@lru_cache(maxsize=1_024)
def provider_of_url(url: str) -> str | None:
    """The provider, by its name in the price book, whose host a base URL names; None for hosts that are not known.

    Subdomains count (`eu.api.openai.com`), look-alikes do not (`notgroq.com`).
    """
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # no URL: the client that was given it says so itself
        return None
    if host.startswith("bedrock") and ".amazonaws.com" in host:
        return "bedrock"
    if host.endswith(("-aiplatform.googleapis.com", ".rep.googleapis.com")):  # with the region before it
        return "vertex"
    labels = host.split(".")
    ends = (".".join(labels[start:]) for start in range(len(labels)))
    return next((_HOSTS[end] for end in ends if end in _HOSTS), None)


@lru_cache(maxsize=1_024)
def region_of_url(url: str) -> str | None:
    """The region that a base URL names, where its provider has prices by region: `eu.api.openai.com`, Vertex's endpoints."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # as above
        return None
    found = _REGIONAL.fullmatch(host)
    return next((region for region in found.groups() if region), None) if found else None


_REGIONAL = re.compile(
    r"(.+)\.api\.openai\.com|(.+)-aiplatform\.googleapis\.com|aiplatform\.(.+)\.rep\.googleapis\.com"
)
