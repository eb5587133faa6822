"""What a call is about to send, read from LiteLLM's arguments or from the body of the request itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import litellm
from litellm.constants import openai_compatible_providers
from litellm.types.utils import all_litellm_params

from bursar.errors import InvalidInput
from bursar_litellm.errors import UNBOUNDED
from bursar_litellm.media import read_media

if TYPE_CHECKING:
    from bursar import Reservation

# The calls that models are paid for, by the provider's path; the async ones have an `a` in front.
ENDPOINTS = {
    "completion": "",
    "text_completion": "completions",
    "embedding": "embeddings",
    "responses": "responses",
    "anthropic_messages": "messages",
    "generate_content": "",
    "generate_content_stream": "",
    "image_generation": "images/generations",
    "image_edit": "images/edits",
    "image_variation": "images/variations",
    "transcription": "audio/transcriptions",
    "speech": "audio/speech",
    "rerank": "rerank",
    "ocr": "ocr",
    "compact_responses": "responses/compact",
    "create_interaction": "interactions",
    "llm_passthrough_route": "",
}
# What is passed on as it is: where it asks a model, and the paths of what costs nothing.
PROMPTS = ("messages", "contents", "prompt", "input", "inputText", "system", "instances")
FREE = re.compile(r"(/count_tokens|/count-tokens|:countTokens|/input_tokens|/tokenize|/moderations)$")
# The most that an answer may have, by the name that LiteLLM's own arguments have for it.
LIMITS = {
    "completion": "max_tokens",
    "text_completion": "max_tokens",
    "responses": "max_output_tokens",
    "anthropic_messages": "max_tokens",
}
_DEPLOYMENTS = frozenset({"azure", "azure_text", "sagemaker", "sagemaker_chat"})  # named by whoever made them
_SETTINGS = frozenset(all_litellm_params) | frozenset(
    ("messages", "metadata", "user", "timeout", "base_url", "extra_headers", "organization", "file", "image", "mask")
)
LIMIT_NAMES = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_NOTHING: Mapping[str, Any] = {}
# LiteLLM drives these by their SDK, which tries twice more where nothing else is said; the others by plain HTTP.
_SDK_RETRIES = 2
_SDKS = frozenset({"openai", "azure", "text-completion-openai"})
_MAX_LENGTH = 512  # of a tag's value
_NAME = re.compile(r"[^A-Za-z0-9_.:/-]")
# What LiteLLM puts before a model's name to choose the format in which it is asked.
_FORMATS = ("responses/", "converse/", "converse_like/", "invoke/", "o_series/", "gpt5_series/")
# What the proxy tells of a call, and its clients do not.
_IDENTITY = frozenset({"org", "team", "team_alias", "user", "customer", "key", "key_alias", "deployment"})


def kind_of(call_type: Any) -> str:
    """The name of the function, sync or async: `acompletion` -> `completion`; empty where nothing is known."""
    name = str(getattr(call_type, "value", call_type) or "")
    if name in ENDPOINTS:
        return name
    for plain in (name, name.removeprefix("a"), name.replace("_a", "_", 1)):
        if plain in ENDPOINTS or plain in UNBOUNDED:
            return plain
    return name


def kind_on_wire(details: Mapping[str, Any]) -> str:
    """The same of a call that is about to go out; empty where no model is asked."""
    kind = kind_of(details.get("call_type"))
    url = str((details.get("additional_args") or {}).get("api_base"))
    if kind in ("create", "acreate"):  # LiteLLM has several functions of that name
        kind = "create_interaction" if url.endswith("/interactions") else ""
    if kind == "create_interaction" and not details.get("model"):
        return "agent_interaction"
    if kind == "llm_passthrough_route" and (FREE.search(url) or wire_body(details).keys().isdisjoint(PROMPTS)):
        return ""
    return kind


def is_async(call_type: Any) -> bool:
    """Whether a call of this type is awaited, by the name alone: `anthropic_messages` always is."""
    name = str(getattr(call_type, "value", call_type) or "")
    return name == "anthropic_messages" or name != kind_of(name)


def read_arguments(kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Bursar.reserve` for a call of one of LiteLLM's functions, from that function's own arguments."""
    asked = str(kwargs.get("model") or "")
    model, provider, _, _ = litellm.get_llm_provider(
        asked, kwargs.get("custom_llm_provider"), kwargs.get("api_base") or kwargs.get("base_url")
    )
    body = {
        name: value
        for name, value in kwargs.items()
        if value is not None and name not in _SETTINGS and not name.startswith(("litellm_", "_"))
    }
    over = _lay_over(body, model)
    named = _plain(model)
    request = {
        "provider": provider,
        "model": _base_model(kwargs) or named,
        "messages": over.get("messages") or kwargs.get("messages"),
        "body": body,
        "endpoint": ENDPOINTS[kind],
        "retries": _retries(kind, provider, kwargs),
        "changeable": (can_change := changeable(kind, provider, named, kwargs)),
        "resize": "max_output_tokens" in can_change and not any(kwargs.get(name) for name in LIMIT_NAMES),
    }
    return request | read_media(kind, request, kwargs.get("file"))


def changeable(kind: str, provider: str, model: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """What `write` can change in these arguments, in the words of `Bursar.call`."""
    if kind not in LIMITS:
        return ()  # vectors of another model could not be compared with those that are there
    over = _mapping(kwargs.get("extra_body"))  # the SDK lays it over what is sent
    thinks = _mapping(kwargs.get("thinking")).get("budget_tokens")
    thinks = thinks or (kwargs.get("reasoning_effort") and "claude" in model)  # LiteLLM makes such a budget of it
    is_name = str(kwargs.get("model")).endswith(model) and provider not in _DEPLOYMENTS
    with_model = is_name and "model" not in over and _base_model(kwargs) is None
    with_limit = not thinks and over.keys().isdisjoint(LIMIT_NAMES)
    return ("model",) * with_model + ("max_output_tokens",) * with_limit


def write(kind: str, kwargs: dict[str, Any], asked: str, granted: Reservation) -> dict[str, Any]:
    """The arguments with what was granted in them. `asked`: the model's name without what LiteLLM has in front of it."""
    if granted.model == asked and not granted.capped:
        return kwargs
    changed = dict(kwargs)
    if granted.model != asked:
        changed["model"] = str(kwargs["model"]).removesuffix(asked) + granted.model
    if granted.capped:
        names = [name for name in LIMIT_NAMES if kwargs.get(name)] or [LIMITS[kind]]
        changed.update(dict.fromkeys(names, granted.max_output_tokens))
    return changed


def read_wire(kind: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """The same from LiteLLM's notes on a call that is about to go out: the body is the one that the provider gets."""
    model, provider = str(details.get("model") or ""), str(details.get("custom_llm_provider") or "")
    if not provider:
        model, provider, _, _ = litellm.get_llm_provider(model)
    settings = details.get("litellm_params") or {}
    optional = details.get("optional_params") or {}
    body = dict(wire_body(details))
    sound = body.pop("file", None)
    messages = details.get("messages")
    if not body:
        body = {name: value for name, value in optional.items() if name not in _SETTINGS}
        if not isinstance(messages, list):
            body["input"] = details.get("input")
    if kind == "speech":
        body["input"] = details.get("input")  # the text itself is left out of what LiteLLM notes
    over = _lay_over(body, model)
    is_limited = _limit_name(kind, provider, body) is not None and over.keys().isdisjoint(LIMIT_NAMES)
    request = {
        "provider": provider,
        "model": _base_model({**optional, **settings}) or _plain(model),
        "messages": messages if isinstance(messages, (list, str)) else None,
        "body": body,
        "endpoint": ENDPOINTS[kind],
        "retries": _retries(kind, provider, {**optional, **settings}),
        "resize": is_limited and not any(body.get(name) for name in LIMIT_NAMES),
        "changeable": ("max_output_tokens",) if is_limited else (),  # LiteLLM has written the body for this very model
    }
    return request | read_media(kind, request, sound)


def _lay_over(body: dict[str, Any], model: str) -> Mapping[str, Any]:
    """Take out the `extra_body`, which goes over what is sent, and lay it over this body: of two numbers the greater counts.

    Raises InvalidInput where it names another model: some providers are sent that one, some are not.
    """
    over = _mapping(body.pop("extra_body", None))
    if over.get("model", model) != model:
        raise InvalidInput(
            f"extra_body names another model than the call, {model!r}. Name it by `model` alone.", argument="extra_body"
        )
    for name, value in over.items():
        both = (body.get(name), value)
        body[name] = max(both) if all(type(one) is int for one in both) else value
    return over


def wire_body(details: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the request: LiteLLM's own dict where it keeps one, so that changes to it are sent."""
    body = (details.get("additional_args") or {}).get("complete_input_dict")
    if isinstance(body, (str, bytes)) and body[:1] in ("{", b"{"):
        try:
            body = json.loads(body)
        except ValueError:
            return {}  # no JSON: measured by its messages
    return body if isinstance(body, dict) else {}


def limit_output(kind: str, details: Mapping[str, Any], tokens: int) -> None:
    """Set the maximum output in the body that is about to go out."""
    body = wire_body(details)
    name = _limit_name(kind, str(details.get("custom_llm_provider") or ""), body)
    assert name is not None, "a smaller maximum was granted where none can be set"
    names = [one for one in LIMIT_NAMES if body.get(one)] or [name]
    body.update(dict.fromkeys(names, tokens))


def ask_for_usage(details: Mapping[str, Any]) -> bool:
    """Have a stream in OpenAI's format end with its usage; whether it was not asked for already."""
    provider = str(details.get("custom_llm_provider") or "")
    if not details.get("stream") or not _speaks_openai(provider):
        return False
    if provider not in _SDKS:
        supported = litellm.get_supported_openai_params(str(details.get("model") or ""), provider) or []
        if "stream_options" not in supported:
            return False
    return ask_for_usage_in(wire_body(details))


def ask_for_usage_in(body: dict[str, Any]) -> bool:
    """The same for a body that is in OpenAI's format."""
    options = body.get("stream_options") or {}
    if body.get("stream") is not True or not ("messages" in body or "prompt" in body) or options.get("include_usage"):
        return False
    body["stream_options"] = {**options, "include_usage": True}
    return True


def _limit_name(kind: str, provider: str, body: Mapping[str, Any]) -> str | None:
    """How the body names its maximum output, where it is in OpenAI's format."""
    if not body or not _speaks_openai(provider):
        return None
    if "messages" in body:
        return "max_completion_tokens" if provider in ("openai", "azure") else "max_tokens"
    if "prompt" in body:
        return "max_tokens"
    return "max_output_tokens" if kind == "responses" and "input" in body else None


def _speaks_openai(provider: str) -> bool:
    return provider in _SDKS or provider in openai_compatible_providers


def _plain(model: str) -> str:
    for form in _FORMATS:
        model = model.removeprefix(form)
    return model


def _base_model(settings: Mapping[str, Any]) -> str | None:
    """The model behind a deployment's name, as Azure's deployments are declared."""
    inner = _mapping(settings.get("metadata")).get("model_info")
    for place in (settings, _mapping(settings.get("model_info")), _mapping(inner)):
        name = place.get("base_model")
        if isinstance(name, str) and name:
            return name.partition("/")[2] or name
    return None


def _retries(kind: str, provider: str, settings: Mapping[str, Any]) -> int:
    if kind == "embedding" and provider == "openai":
        settings = {"max_retries": settings.get("max_retries") or None}  # LiteLLM takes 0 for "not said"
    for name in ("num_retries", "max_retries"):
        value = settings.get(name)
        if isinstance(value, int):
            return max(0, value)
    return _SDK_RETRIES if provider in _SDKS else 0


# -- whose call it is --------------------------------------------------------------------------------------------


def read_tags(settings: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, str]:
    """The tags of a call. `settings`: LiteLLM's arguments; `own`: the logger's tags, clean.

    `metadata={"bursar": {...}}` names tags freely; of a proxy's clients they are taken too, but never who they are, which
    the proxy found out by their key, nor what it says of the call.
    """
    metadata: dict[str, Any] = {}
    for name in ("metadata", "litellm_metadata"):
        metadata.update(_mapping(settings.get(name)))
    free = dict(_mapping(metadata.get("bursar")))
    found: dict[str, Any] = {
        "run": settings.get("litellm_session_id") or metadata.get("session_id"),
        "customer": settings.get("user"),
        "deployment": metadata.get("model_group"),
    }
    labels = metadata.get("tags")
    for label in labels if isinstance(labels, (list, tuple)) else ():
        found[f"tag.{label}"] = "yes"
    identity: dict[str, Any] = {}
    if "user_api_key_hash" in metadata or "user_api_key" in metadata:
        free = {
            name: value for name, value in clean(free).items() if name not in _IDENTITY and not name.startswith("tag.")
        }
        identity = {
            "key": metadata.get("user_api_key_hash") or metadata.get("user_api_key"),
            "key_alias": metadata.get("user_api_key_alias"),
            "team": metadata.get("user_api_key_team_id"),
            "team_alias": metadata.get("user_api_key_team_alias"),
            "user": metadata.get("user_api_key_user_id"),
            "org": metadata.get("user_api_key_org_id"),
            "customer": metadata.get("user_api_key_end_user_id") or settings.get("user"),
        }
    tags = {**clean({**found, **free}), **own}
    return tags | clean(identity) if identity else tags


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, if it is an object; else an empty one."""
    return value if type(value) is dict or (value is not None and isinstance(value, Mapping)) else _NOTHING


def clean(tags: Mapping[str, Any]) -> dict[str, str]:
    """The tags as the books take them: printable text of at most 512 characters; those without a value are left out."""
    cleaned = {}
    for name, value in tags.items():
        text = "" if value is None else str(value)
        if text:
            if not text.isprintable():
                text = "".join(sign if sign.isprintable() else "?" for sign in text)
            cleaned[_NAME.sub("_", str(name))[:64]] = text[:_MAX_LENGTH]
    return cleaned
