"""What embeddings were billed: LlamaIndex drops the usage that OpenAI states, so it is read where the answer arrives."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from bursar.errors import BursarError
from bursar.usage import Usage
from bursar_llamaindex.calls import Call
from bursar_llamaindex.spans import log

_MODULE = "llama_index.embeddings.openai.base"

# The calls that this thread or task is sending.
sending: ContextVar[tuple[Call, ...]] = ContextVar("bursar_llamaindex_sending", default=())


def listen(instance: Any, *, is_async: bool) -> None:
    """Have the HTTP client of OpenAI's embedding models show each of its answers. Others' calls settle at their estimate."""
    if not any(c.__module__ == _MODULE for c in type(instance).__mro__):
        return
    hooks = http_hooks(instance, is_async=is_async)
    hook = _aheard if is_async else _heard
    if hooks is not None and hook not in hooks["response"]:
        hooks["response"].append(hook)


def http_hooks(instance: Any, *, is_async: bool) -> dict[str, list[Any]] | None:
    """Those of the client of httpx by which an object of OpenAI's or Anthropic's integration sends, by event.

    None where each call has a client of its own.
    """
    if not getattr(instance, "reuse_client", True):
        return None
    get = getattr(instance, "_get_aclient" if is_async else "_get_client", None)
    client = getattr(instance, "_aclient" if is_async else "_client", None) if get is None else get()
    return getattr(getattr(client, "_client", None), "event_hooks", None)


def announce_sending(calls: list[Call]) -> None:
    """What this thread or task sends from here on is for these calls."""
    if calls and not calls[0].is_llm:  # LLMs state their usage, and a conversation is not to be kept for longer
        sending.set(tuple(calls))


def _heard(response: Any) -> None:
    if sending.get() and response.status_code == 200:
        response.read()
        _take_down(response)


async def _aheard(response: Any) -> None:
    if sending.get() and response.status_code == 200:
        await response.aread()
        _take_down(response)


def _take_down(response: Any) -> None:
    try:
        usage = Usage.from_response("openai", {"usage": response.json().get("usage")})
    except (BursarError, ValueError, AttributeError) as error:
        # Raised, it would cost the user the answer; the call then settles at its estimate.
        log.warning("the usage of an embedding could not be read: %s", error)
        return
    for call in sending.get():
        so_far = call.usage
        call.usage = usage if so_far is None else so_far.replace(input_tokens=so_far.input_tokens + usage.input_tokens)
