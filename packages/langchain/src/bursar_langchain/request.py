"""What a model call is about to send, read from the event that announces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


def words(text: str) -> frozenset[str]:
    """The words of a text, for sets of field names."""
    return frozenset(text.split())


# Settings of the client in `invocation_params`: none of them reaches the prompt.
_CLIENT_SETTINGS = words(
    "_type model model_name model_id engine deployment_name azure_deployment streaming stream_usage model_kwargs max_retries"
    " timeout request_timeout default_request_timeout extra_headers default_headers default_query betas verbose"
    " ls_structured_output_format disable_streaming stop_sequences stop headers base_url"
)
# In the order in which they win over each other.
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample", "num_predict")
# Settings of ChatOpenAI that take it to the Responses API, where those two go the other way round.
_RESPONSES = words("reasoning include truncation context_management use_previous_response_id")
# The clients' own retries where none are set: the SDKs of OpenAI, Anthropic and Groq try 2 times more, others up to 6.
_SDK_RETRIES, _OTHER_RETRIES = 2, 6
_SDKS = frozenset(("openai", "azure", "anthropic", "groq"))


def read_start(
    serialized: Mapping[str, Any] | None,
    messages: Sequence[Any],
    invocation_params: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The arguments of `Bursar.reserve` for the call: provider, model, messages, body, maximum output, retries.

    `messages`: LangChain's message objects, or prompts. Nothing is copied but the names of settings: what is read stays
    as it was, because LangChain shares these objects with the call.
    """
    params = {**(invocation_params or {})}
    params.update(params.get("model_kwargs") or {})
    metadata = metadata or {}
    fields = (serialized or {}).get("kwargs") or {}
    provider = _provider(serialized, fields, params, metadata)
    model = _first_text(
        params.get("model"),
        params.get("model_name"),
        params.get("model_id"),
        metadata.get("ls_model_name"),
        params.get("deployment_name"),
        fields.get("model"),
        fields.get("model_name"),
    )
    retries = _first_count(fields.get("max_retries"), params.get("max_retries"))
    if retries is None:
        retries = _SDK_RETRIES if provider in _SDKS else _OTHER_RETRIES
    body = {
        name: _plain(value)
        for name, value in params.items()
        if value is not None and name not in _CLIENT_SETTINGS and name not in _OUTPUT_LIMITS
    }
    body["model"] = model
    return {
        "provider": provider,
        "model": model,
        "messages": messages,
        "max_output_tokens": _output_limit(params, metadata, by_responses=_by_responses(fields)),
        "body": body,
        "retries": retries,
    }


def _plain(value: Any) -> Any:
    """A setting as it goes over the wire: classes that describe an output or a tool become their JSON schema."""
    if isinstance(value, (list, tuple)):
        return value if all(isinstance(one, (str, Mapping)) for one in value) else [_plain(one) for one in value]
    if isinstance(value, type):
        schema = getattr(value, "model_json_schema", None)
        return schema() if schema is not None else {"title": value.__name__, "fields": str(value.__dict__)}
    return value


def limit_names(invocation_params: Mapping[str, Any]) -> tuple[str, ...]:
    """The names by which a call states its maximum output: what of it was set where shows in several."""
    return tuple(name for name in _OUTPUT_LIMITS if name in invocation_params)


def _output_limit(params: Mapping[str, Any], metadata: Mapping[str, Any], *, by_responses: bool) -> int | None:
    """The maximum output that goes over the wire; None where none does.

    Measured: a `max_tokens` of the call wins over the model's own `max_completion_tokens`, and as None it removes it; but
    loses against it in the Responses API.
    """
    first, second, *others = _OUTPUT_LIMITS
    for name in (second, first, *others) if by_responses else _OUTPUT_LIMITS:
        if name in params:
            found = _first_count(params[name])
            if found or name == "max_tokens":
                return found or None
    return _first_count(metadata.get("ls_max_tokens")) or None


def _by_responses(fields: Mapping[str, Any]) -> bool:
    """Whether the model's own settings send its calls to OpenAI's Responses API."""
    said = fields.get("use_responses_api")
    if isinstance(said, bool):
        return said
    return fields.get("output_version") == "responses/v1" or any(fields.get(name) for name in _RESPONSES)


def _provider(
    serialized: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> str:
    path = (serialized or {}).get("id") or [""]
    named = _first_text(metadata.get("ls_provider"), path[-1], params.get("_type"))
    base_url = fields.get("openai_api_base") or fields.get("base_url")
    return _provider_at(named, base_url if isinstance(base_url, str) else "")


@lru_cache(maxsize=1_024)
def _provider_at(named: str, base_url: str) -> str:
    from bursar.prices import provider_of_url  # the price book loads with the first call, not with the import
    from bursar.prices.names import provider_name

    provider = provider_name(named)
    return (provider_of_url(base_url) or provider) if provider == "openai" and base_url else provider


def _first_text(*values: Any) -> str:
    for value in values:
        if isinstance(value, str) and value:
            return value
    return "unknown"


def _first_count(*values: Any) -> int | None:
    return next((value for value in values if type(value) is int and value >= 0), None)
