"""Which models share a tokenizer and a prompt format, told from their names."""

from __future__ import annotations

import re
from functools import lru_cache

_FAMILIES = (
    ("claude", ("claude",)),
    ("gpt", ("gpt", "davinci", "babbage", "text-embedding-3", "text-embedding-ada", "codex")),
    ("gemini", ("gemini", "gemma", "learnlm")),
    ("mistral", ("mistral", "mixtral", "magistral", "codestral", "ministral", "pixtral", "devstral", "voxtral")),
    ("grok", ("grok",)),
    ("llama", ("llama",)),
    ("qwen", ("qwen", "qwq")),
    ("deepseek", ("deepseek",)),
    ("nova", ("nova", "titan")),
    ("command", ("command", "c4ai", "embed-", "rerank")),
    ("glm", ("glm",)),
    ("kimi", ("kimi",)),
)
_VERSIONED = frozenset(("claude", "gpt", "gemini", "llama", "nova", "grok", "deepseek"))
_SERIES = ("o1", "o3", "o4")
# Whose models a provider serves, where the name alone (a deployment's) says nothing.
_HOUSES = (("openai", "gpt"), ("azure", "gpt"), ("anthropic", "claude"), ("mistral", "mistral"), ("xai", "grok"))
_DIGIT = re.compile(r"\d")


@lru_cache(maxsize=4096)
def family_of(provider: str, model: str) -> str:
    """The family whose tokenizer and prompt format a model shares: `claude`, `gpt`, `gemini`, ..., else `other`."""
    name = model.lower().rsplit("/", 1)[-1]
    if "gpt-oss" in name:
        return "gpt-oss"
    for family, marks in _FAMILIES:
        if any(mark in name for mark in marks):
            return family
    if name.startswith(_SERIES):
        return "gpt"
    for mark, family in _HOUSES:
        if mark in provider:
            return family
    return "other"


@lru_cache(maxsize=4096)
def line_of(family: str, provider: str, model: str, embeds: bool) -> str:
    """The product line that shares a prompt format: `claude-4`, `gpt-5`, `gpt-o`, `gpt-embed`, `mistral`, ..."""
    if embeds:
        return f"{family}-embed"
    if family not in _VERSIONED:
        return family
    name = model.lower().rsplit("/", 1)[-1]
    if family == "gpt" and name.startswith(_SERIES):
        return "gpt-o"
    version = _DIGIT.search(name.split(family, 1)[-1])
    line = f"{family}-{version[0]}" if version else family
    # Vertex does not bill the thought signatures that the Gemini API bills.
    return f"{line}-vertex" if family == "gemini" and "vertex" in provider else line
