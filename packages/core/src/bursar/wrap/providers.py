"""Which provider a client talks to: told by its class, by the host of its base URL, or by the SDK it comes from."""

from __future__ import annotations

from functools import lru_cache

from bursar.prices import provider_of_url

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
    known = provider_of_url(base_url)
    if known is not None:
        return known
    # the class that the SDK defines, not a subclass in the user's own module
    sdk = next(one for one in reversed(kind.__mro__) if hasattr(one, "copy"))
    return sdk.__module__.partition(".")[0]
