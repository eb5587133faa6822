"""What a call is about to send, read from the object that makes it and the settings of the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "num_predict")
# Settings of the client, and what is read by itself: none of them is a further part of the prompt.
_CLIENT_SETTINGS = frozenset((
    "messages", "prompt", "model", "model_name", "stream", "stream_options", "timeout", "extra_headers", "default_headers",
    "headers", "api_key", "api_base", "base_url", "use_chat_completions", "formatted", "callback_manager", "max_retries",
))  # fmt: skip
OPENAI_CHAT = "llama_index.llms.openai.base"
_APIS = {
    OPENAI_CHAT: "chat",
    "llama_index.llms.openai.responses": "responses",
    "llama_index.llms.anthropic.base": "messages",
}
_OPENAI_EMBEDDINGS = "llama_index.embeddings.openai.base"
_NAMESPACES = ("llama_index.llms.", "llama_index.embeddings.", "llama_index.multi_modal_llms.")
_SENDS_NOTHING = ("llama_index.core.llms.mock", "llama_index.core.embeddings.mock_embed_model")
_OTHER_RETRIES = 2  # what SDKs try more where nothing is said


class Kind(NamedTuple):
    """What a class tells of the calls that its objects make.

    `api`: "chat" or "responses" of OpenAI's, "messages" of Anthropic's, empty for what others send; `limits`, `tools`,
    `models`: those of its fields that say such a thing, because asking pydantic's objects for fields that they do not have
    takes longer than all the rest.
    """

    integration: str
    api: str
    retries_twice: bool
    limits: tuple[str, ...]
    tools: tuple[str, ...]
    models: tuple[str, ...]
    thinks: bool
    continues: bool


_kinds: dict[type, Kind] = {}


def kind_of(cls: type) -> Kind:
    """Subclasses are of the integration that they build on; what belongs to none goes by its class's name."""
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds[cls] = _kind(cls)
    return kind


def _kind(cls: type) -> Kind:
    modules = [base.__module__ for base in cls.__mro__]
    integration = next(
        (name.removeprefix(space).split(".")[0] for name in modules for space in _NAMESPACES if name.startswith(space)),
        cls.__name__,
    )
    api = next((_APIS[name] for name in modules if name in _APIS), "")
    private = getattr(cls, "__private_attributes__", {})

    def known(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in fields or hasattr(cls, name) or name in private)

    fields = getattr(cls, "model_fields", {})
    return Kind(
        integration,
        api,
        api in ("chat", "responses") or _OPENAI_EMBEDDINGS in modules,
        known(*OUTPUT_LIMITS),
        known("built_in_tools", "tools"),
        known("model", "model_name"),
        bool(known("thinking_dict")),
        bool(known("_previous_response_id")),
    )


def sends_nothing(instance: Any) -> bool:
    """Whether the object is one of LlamaIndex's own stand-ins for tests."""
    return type(instance).__module__ in _SENDS_NOTHING


def provider_of(instance: Any) -> str:
    """The price book's name of whoever bills the object's calls."""
    base_url = getattr(instance, "api_base", None)
    return _provider(kind_of(type(instance)).integration, base_url if isinstance(base_url, str) else None)


@lru_cache(maxsize=1_024)
def _provider(integration: str, base_url: str | None) -> str:
    from bursar.prices import provider_of_url  # the price book loads with the first call, not with the import
    from bursar.prices.names import provider_name

    provider = provider_name(integration)
    if provider in ("openai", "openai-like"):
        return (provider_of_url(base_url) if base_url is not None else None) or "openai"
    return provider


def read_llm(instance: Any, method: str, conversation: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Bursar.reserve` for a call of an LLM. `conversation`: messages, or a prompt."""
    kind, own = kind_of(type(instance)), mapping(instance, "additional_kwargs")
    said = {**own, **settings, "tools": _tools(instance, kind, own, settings)}
    if kind.thinks:
        said["thinking"] = instance.thinking_dict
    if kind.continues:
        said["previous_response_id"] = instance._previous_response_id
    body = {
        name: plain
        for name, value in said.items()
        if name not in _CLIENT_SETTINGS
        and name not in OUTPUT_LIMITS
        and value not in (None, [])
        and (plain := _plain(value)) is not None
    }
    limit = _output_limit(instance, kind, own, settings)
    body["model"] = model = _model(instance, kind, own, settings)
    body["prompt" if isinstance(conversation, str) else "messages"] = conversation
    return {
        "provider": provider_of(instance),
        "model": model,
        "max_output_tokens": limit,
        "body": body,
        "retries": _retries(instance, kind, streams="stream" in method),
    }


def read_embedding(instance: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The arguments of `Bursar.reserve` for a call of an embedding model."""
    # OpenAI's keeps the model that it asks for in its engine.
    model = _first_text(getattr(instance, "_text_engine", None), getattr(instance, "model_name", None))
    return {
        "provider": provider_of(instance),
        "model": model,
        "body": {"model": model, "input": list(texts)} if texts else None,
        "endpoint": "embeddings",
        "retries": _retries(instance, kind_of(type(instance)), streams=False),
        "resize": False,
        "changeable": (),
    }


def embedded_texts(arguments: Mapping[str, Any], batch: int, batch_size: int) -> list[str]:
    """The texts of one request of an embedding method, whose event does not say them: its batch of `texts`, or the one."""
    texts = arguments.get("texts")
    if isinstance(texts, (list, tuple)):
        return [text for text in texts[batch * batch_size : (batch + 1) * batch_size] if isinstance(text, str)]
    return [text for name in ("text", "query") if isinstance(text := arguments.get(name), str)]


def _model(instance: Any, kind: Kind, own: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    named = (own.get("model"), settings.get("model"), *(getattr(instance, name) for name in kind.models))
    return _first_text(*named) if any(named) else _first_text(instance.metadata.model_name)


def _output_limit(instance: Any, kind: Kind, own: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    """The largest maximum that is set anywhere: which of them wins differs from integration to integration."""
    values = [source.get(name) for source in (own, settings) for name in OUTPUT_LIMITS if name in source]
    values += [getattr(instance, name) for name in kind.limits]
    return max((value for value in values if type(value) is int and value > 0), default=None)


def _retries(instance: Any, kind: Kind, *, streams: bool) -> int:
    """How often the client may try again. OpenAI's integration retries around an SDK that retries: measured, n * (n + 1) tries."""
    retries = getattr(instance, "max_retries", None)
    if type(retries) is not int or retries < 0:
        return _OTHER_RETRIES
    return retries * (retries + 1) - 1 if kind.retries_twice and retries and not streams else retries


def _tools(instance: Any, kind: Kind, own: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Any]:
    """The tools of the request and of the object, which may be the provider's own."""
    sources = (settings.get("tools"), own.get("tools"), *(getattr(instance, name) for name in kind.tools))
    return [tool for tools in sources if isinstance(tools, (list, tuple)) for tool in tools]


def _plain(value: Any) -> Any:
    """The value where it can be sent as JSON; a pydantic class as its schema, which is how it is sent."""
    if isinstance(value, (str, int, float, Mapping, list, tuple)):
        return value
    schema = getattr(value, "model_json_schema", None)
    return schema() if isinstance(value, type) and callable(schema) else None


def mapping(instance: Any, name: str) -> Mapping[str, Any]:
    value = getattr(instance, name, None)
    return value if isinstance(value, (dict, Mapping)) else {}


def _first_text(*values: Any) -> str:
    found = next((value for value in values if isinstance(value, str) and value), "unknown")
    return str(getattr(found, "value", found))  # some are enumerations
