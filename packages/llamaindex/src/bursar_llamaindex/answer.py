"""What a call turned out to be, read from the event that ends it: a cost, nothing, or nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.ending import Ending, released, settled, unknown
from bursar.errors import BursarError
from bursar.usage import Usage

# What LlamaIndex's integrations call the counts where they keep no answer of the provider.
_COUNTS = (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))


def read_answer(provider: str, response: Any) -> Ending:
    """The end of an LLM call that was answered. `response`: a ChatResponse, a CompletionResponse, or the last of a stream."""
    if response is None:
        return unknown("the stream ended without an answer")
    usage = _of_provider(provider, getattr(response, "raw", None)) or _of_counts(
        getattr(response, "additional_kwargs", None)
    )
    return unknown("the answer states no usage") if usage is None else settled(usage)


def read_drop(error: BaseException | None, *, was_sent: bool = True) -> Ending:
    """The end of a call of which LlamaIndex told no end: another handler failed, or another of its batch."""
    if not was_sent and isinstance(error, BursarError):
        return released("not sent: another of its batch was refused")
    return unknown("no end was told" if error is None else f"no end was told: {type(error).__name__}")


def _of_provider(provider: str, raw: Any) -> Usage | None:
    """The usage in the provider's own words. Anthropic's integration keeps a dict of SDK objects."""
    if raw is None:
        return None
    if isinstance(raw, Mapping):
        raw = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in raw.items()}
    try:
        return Usage.from_response(provider, raw)
    except BursarError:
        return None  # the integration's own counts follow


def _of_counts(counts: Any) -> Usage | None:
    if not isinstance(counts, Mapping):
        return None
    nested = counts.get("usage")
    for facts in (counts, nested if isinstance(nested, Mapping) else {}):
        for names in _COUNTS:
            found = [count for name in names if type(count := facts.get(name)) is int and count >= 0]
            if len(found) == len(names):
                return Usage(input_tokens=found[0], output_tokens=found[1])
    return None
