"""What a model call turned out to be, read from the event that ends it: a cost, nothing, or nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.ending import Ending, failed, released, settled, unknown
from bursar.errors import BursarError, Stopped, UnreadableAnswer
from bursar.usage import Usage

_PLAIN = frozenset(
    ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details")
)
_PLAIN_PARTS = frozenset(("cached_tokens", "audio_tokens", "reasoning_tokens"))
_TIERS = ("priority", "flex")


def read_end(provider: str, result: Any, *, in_batch: bool = False, tools: Any = None) -> Ending:
    """The end of a call that was answered. `result` is the LLMResult; `in_batch`: one prompt of several; `tools`: those offered."""
    message = _message(result)
    metadata = getattr(message, "usage_metadata", None) or {}
    if metadata.get("total_cost") == 0:
        return released("answered from LangChain's cache")
    output = result.llm_output or {}
    if in_batch and message is None and output.get("token_usage") == {}:
        # A completion model's batch states its usage once, with the first prompt.
        return settled(Usage(requests=0), reason="counted with the first prompt of the batch")
    stated = {**(getattr(message, "response_metadata", None) or {}), **output}
    usage = None if _is_plain(stated) else _stated(provider, stated)
    usage = usage or _normalised(metadata, stated) or _stated(provider, stated)
    if usage is None:
        return unknown(
            "the answer states no usage: a stream at another base URL does so with stream_usage=True, which the "
            "middleware sets"
        )
    if not usage.server_tools and (used := _server_tools(message, usage.model, tools)):
        usage = usage.replace(server_tools=used)
    if usage.input_tokens == 0:
        return unknown("the answer states no input tokens", usage)
    return settled(usage)


def read_error(provider: str, error: BaseException, result: Any) -> Ending:
    """The end of a call that failed. An answer that came with status 200 is billed, whatever went wrong with it here."""
    message = _message(result)
    facts = getattr(message, "response_metadata", None) or {}
    known = _normalised(getattr(message, "usage_metadata", None) or {}, facts)
    if isinstance(error, Stopped):
        return unknown(f"stopped in mid-stream ({error.cause})", known)
    if facts.get("status_code") == 200 and facts.get("body") is not None:
        try:
            return settled(Usage.from_response(provider, facts["body"]), outcome="failed", reason=type(error).__name__)
        except UnreadableAnswer:
            return unknown(f"{type(error).__name__} after an answer", known)
    if getattr(message, "content", None):  # a provider's error in mid-stream may have the code of a refusal
        return unknown(type(error).__name__, known)
    return failed(error, known)


def _message(result: Any) -> Any:
    """The first generation's message: with n answers each repeats the same usage."""
    generations = getattr(result, "generations", None)
    first = generations[0] if generations else None
    return getattr(first[0], "message", None) if first else None


def _is_plain(facts: Mapping[str, Any]) -> bool:
    """Whether the provider's own words say no more than LangChain's `usage_metadata`, which is read in a tenth of the time."""
    raw = facts.get("token_usage")
    if not raw or facts.get("service_tier") not in (None, "default"):
        return False
    details = [raw.get("prompt_tokens_details") or {}, raw.get("completion_tokens_details") or {}]
    more = [value for name, value in raw.items() if name not in _PLAIN]
    more += [value for part in details for name, value in part.items() if name not in _PLAIN_PARTS]
    return not any(more)


def _stated(provider: str, facts: Mapping[str, Any]) -> Usage | None:
    """The usage in the provider's own words, which LangChain keeps where the answer was not streamed."""
    raw = facts.get("token_usage") or facts.get("usage")
    if not isinstance(raw, Mapping):
        return None
    body = {"model": _model(facts), "usage": raw, "service_tier": facts.get("service_tier")}
    try:
        return Usage.from_response(provider, {name: value for name, value in body.items() if value is not None})
    except BursarError:
        return None  # LangChain's own reading of it follows


def _normalised(metadata: Mapping[str, Any], facts: Mapping[str, Any]) -> Usage | None:
    """LangChain's `usage_metadata`: totals that hold their parts. OpenAI's tiers put their name before each part's."""
    if not isinstance(metadata.get("input_tokens"), int):
        return None
    inputs, outputs = metadata.get("input_token_details") or {}, metadata.get("output_token_details") or {}
    tier = next((one for one in _TIERS if one in inputs or one in outputs), None)
    if not any(inputs.values()) and not any(outputs.values()):
        return Usage(
            input_tokens=metadata["input_tokens"],
            output_tokens=metadata.get("output_tokens") or 0,
            model=_model(facts),
            service_tier=tier or facts.get("service_tier"),
        )

    def part(details: Mapping[str, Any], name: str) -> int:
        value = details.get(name) or (details.get(f"{tier}_{name}") if tier else None)
        return value if isinstance(value, int) else 0

    write_5m, write_1h = part(inputs, "ephemeral_5m_input_tokens"), part(inputs, "ephemeral_1h_input_tokens")
    return Usage(
        input_tokens=metadata["input_tokens"],
        output_tokens=metadata.get("output_tokens") or 0,
        cache_read_tokens=part(inputs, "cache_read"),
        cache_write_5m_tokens=write_5m or (0 if write_1h else part(inputs, "cache_creation")),
        cache_write_1h_tokens=write_1h,
        input_audio_tokens=part(inputs, "audio"),
        output_audio_tokens=part(outputs, "audio"),
        reasoning_tokens=part(outputs, "reasoning"),
        model=_model(facts),
        service_tier=tier or facts.get("service_tier"),
    )


def _server_tools(message: Any, model: str | None, offered: Any) -> Mapping[str, int]:
    """How often the provider used tools of its own, which it bills by the call: by the content, where LangChain drops its usage."""
    content = getattr(message, "content", None)
    blocks = [*(content if isinstance(content, list) else ())]
    blocks += (getattr(message, "additional_kwargs", None) or {}).get("tool_outputs") or ()
    blocks = [_as_sent(one) for one in blocks if isinstance(one, Mapping)]
    body: dict[str, Any] = {"model": model, "usage": {"input_tokens": 1, "output_tokens": 1}}
    if any(one.get("type") == "server_tool_use" for one in blocks):
        # Anthropic's; a search that ended in an error is free
        ended = [(one.get("type"), isinstance(one.get("content"), list)) for one in blocks]
        body["usage"]["server_tool_use"] = {"web_search_requests": ended.count(("web_search_tool_result", True))}
        body |= {"type": "message", "role": "assistant", "content": blocks}
    elif any(str(one.get("type")).endswith("_call") for one in blocks):
        body |= {"object": "response", "output": blocks, "tools": offered or []}
    else:
        return {}
    try:
        return Usage.from_response("anthropic" if "content" in body else "openai", body).server_tools
    except BursarError:
        return {}


def _as_sent(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """A block of the content as OpenAI or Anthropic sent it, where LangChain has put it into its own form, `"v1"`."""
    kind, more = block.get("type"), block.get("extras") or {}
    if kind == "server_tool_result" and more.get("block_type"):
        return {"type": more["block_type"], "content": [] if block.get("status") == "success" else None}
    if kind != "server_tool_call":
        return block
    if str(block.get("id")).startswith("srvtoolu"):
        return {"type": "server_tool_use", "name": block.get("name")}
    return {"type": f"{block.get('name')}_call", "action": block.get("args"), "container_id": more.get("container_id")}


def _model(facts: Mapping[str, Any]) -> str | None:
    name = facts.get("model_name") or facts.get("model")
    return name if isinstance(name, str) else None
