"""What a model call is about to send, read from CrewAI's LLM object and the arguments of its call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_SDK_RETRIES = 2  # of the SDKs of OpenAI, Anthropic, Azure and Bedrock as CrewAI builds them, where nothing else is set


def read_request(llm: Any, messages: Any, tools: Any, response_model: Any) -> dict[str, Any]:
    """The arguments of `Bursar.call`: provider, model, messages, body, maximum output, retries. Nothing is changed."""
    from bursar.prices.names import provider_name  # the price book loads with the first call, not with the import

    model = str(llm.model)
    body: dict[str, Any] = {**(getattr(llm, "additional_params", None) or {}), "model": model}
    if tools:
        body["tools"] = _as_sent(llm, tools)
    schema = response_model or getattr(llm, "response_format", None)
    if schema is not None:
        body["response_format"] = _schema(schema)
    is_litellm = getattr(llm, "is_litellm", False)
    if is_litellm and getattr(llm, "n", None):
        body["n"] = llm.n
    prefix = model.partition("/")[0] if is_litellm and "/" in model else ""
    return {
        "provider": provider_name(prefix or str(getattr(llm, "provider", "") or "openai")),
        "model": model,
        "messages": messages,
        "max_output_tokens": _output_limit(llm),
        "body": body,
        "retries": retries if type(retries := getattr(llm, "max_retries", None)) is int else _SDK_RETRIES,
    }


def _output_limit(llm: Any) -> int | None:
    """The largest that is set: which of them goes over the wire differs by client."""
    limits = [getattr(llm, name, None) for name in _OUTPUT_LIMITS]
    return max((int(limit) for limit in limits if isinstance(limit, (int, float)) and limit > 0), default=None)


def _as_sent(llm: Any, tools: Any) -> Any:
    """The tools as the client will write them, which is longer than CrewAI's own form of them."""
    try:
        return llm._convert_tools_for_interference(tools)
    except Exception:  # noqa: BLE001 - what the client cannot convert it will refuse itself; the given form is measured
        return [tool if isinstance(tool, Mapping) else str(tool) for tool in tools]


def _schema(model: Any) -> Any:
    if isinstance(model, type) and hasattr(model, "model_json_schema"):
        return {"type": "json_schema", "json_schema": {"name": model.__name__, "schema": model.model_json_schema()}}
    return model
