"""What a model call is about to send, read from CrewAI's LLM object; and the object that sends what was granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bursar import Reservation

# The fields from which CrewAI's clients take the maximum output. Where none is set, the first is the one to set.
_LIMITS = {
    "LLM": ("max_tokens", "max_completion_tokens"),
    "OpenAICompatibleCompletion": ("max_tokens", "max_completion_tokens"),
    "OpenAICompletion": ("max_completion_tokens", "max_tokens"),
    "AnthropicCompletion": ("max_tokens",),
    "AzureCompletion": ("max_tokens",),
    "BedrockCompletion": ("max_tokens",),
    "GeminiCompletion": ("max_output_tokens",),
}
_ANY_LIMIT = ("max_completion_tokens", "max_output_tokens", "max_tokens")
# What CrewAI's clients keep of their model's name: whether this is in it.
_FLAGS = {"is_o1_model": "o1", "is_gpt4_model": "gpt-4", "is_claude_3": "claude-3"}
_PYDANTIC = ("__pydantic_private__", "__pydantic_extra__", "__pydantic_fields_set__")
_SDK_RETRIES = 2  # of the SDKs of OpenAI, Anthropic, Azure and Bedrock as CrewAI builds them, where nothing else is set


def read_request(llm: Any, messages: Any, tools: Any, response_model: Any) -> dict[str, Any]:
    """The arguments of `Bursar.call`: provider, model, messages, body, maximum output, retries, and what can be changed."""
    from bursar.prices.names import provider_name  # the price book loads with the first call, not with the import

    prefix, model = _named(llm)
    body: dict[str, Any] = {**(getattr(llm, "additional_params", None) or {}), "model": model}
    if tools:
        body["tools"] = _as_sent(llm, tools)
    schema = response_model or getattr(llm, "response_format", None)
    if schema is not None:
        body["response_format"] = _schema(schema)
    if getattr(llm, "is_litellm", False) and getattr(llm, "n", None):
        body["n"] = llm.n
    retries = getattr(llm, "max_retries", body.get("max_retries"))
    said = {
        "provider": provider_name(prefix.rstrip("/") or str(getattr(llm, "provider", "") or "openai")),
        "model": model,
        "messages": messages,
        "max_output_tokens": _output_limit(llm),
        "body": body,
        "retries": retries if type(retries) is int else _SDK_RETRIES,
        "changeable": _changeable(llm),
    }
    if "max_output_tokens" not in said["changeable"]:
        said["resize"] = False
    return said


def as_granted(llm: Any, reservation: Reservation) -> Any:
    """A twin of this client that sends the model and the maximum output of the reservation.

    Clients are shared by calls and threads, so none is changed. A twin has the client's own connections and counters.
    """
    prefix, model = _named(llm)
    twin = object.__new__(type(llm))
    # As it stands for this call: CrewAI keeps what holds for one call by the identity of the client.
    fields = {**llm.__dict__, "stop": llm.stop_sequences, "stream": llm._effective_stream()}
    if reservation.model != model:
        fields["model"] = prefix + reservation.model
        if "model_id" in fields:  # Bedrock's
            fields["model_id"] = fields["model"]
        fields.update({flag: part in reservation.model for flag, part in _FLAGS.items() if flag in fields})
    if reservation.capped:
        names = _limits(llm)
        for name in [name for name in names if fields.get(name)] or names[:1]:
            fields[name] = reservation.max_output_tokens
    for name, value in (("__dict__", fields), *((name, getattr(llm, name)) for name in _PYDANTIC)):
        object.__setattr__(twin, name, value)
    return twin


def _changeable(llm: Any) -> tuple[str, ...]:
    """What goes over the wire as the client's fields say. A client of the user's own may send anything."""
    call = next(kind for kind in type(llm).__mro__ if "call" in kind.__dict__)
    if call.__module__.partition(".")[0] != "crewai" or getattr(llm, "_responses_delegate", None) is not None:
        return ()
    model = () if getattr(llm, "is_azure_openai_endpoint", False) else ("model",)  # the URL names Azure's deployments
    limit = () if getattr(llm, "thinking", None) else ("max_output_tokens",)  # a maximum below its budget is an error
    return model + limit


def _named(llm: Any) -> tuple[str, str]:
    """What LiteLLM's way has in front of the model's name, to say who is asked (else nothing), and the name."""
    name = str(llm.model)
    first, slash, rest = name.partition("/")
    return (first + slash, rest) if slash and getattr(llm, "is_litellm", False) else ("", name)


def _limits(llm: Any) -> tuple[str, ...]:
    return next((_LIMITS[kind.__name__] for kind in type(llm).__mro__ if kind.__name__ in _LIMITS), _ANY_LIMIT)


def _output_limit(llm: Any) -> int | None:
    """The largest that is set: which of two goes over the wire differs by client."""
    limits = [getattr(llm, name, None) for name in _limits(llm)]
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
