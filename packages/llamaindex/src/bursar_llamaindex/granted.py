"""What a call may be granted, and how it gets into what LlamaIndex is about to send: another model, a smaller maximum."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bursar_llamaindex.request import OPENAI_CHAT, OUTPUT_LIMITS, Kind, kind_of, mapping

if TYPE_CHECKING:
    from bursar import Reservation

_LIMITS = {"chat": "max_tokens", "responses": "max_output_tokens", "messages": "max_tokens"}
_DEPLOYMENTS = ("azure_openai",)  # their models stand in the address, not in the request


def changeable(instance: Any, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What `write` can change in a call of this object with these settings, in the words of `Bursar.reserve`.

    Of OpenAI's and Anthropic's clients, and those built on them, it is known what they send. The settings of a call come
    before the object's own, but for those that OpenAI's chat client takes from `additional_kwargs` and `max_tokens`.
    """
    kind = kind_of(type(instance))
    if not kind.api:
        return ()
    if kind.api == "chat":
        own = mapping(instance, "additional_kwargs")
        has_model, has_limit = "model" in own, "extra_body" in own and _is_fixed(instance, own)
    else:  # a budget of thinking has to be less than the maximum
        has_model, has_limit = False, kind.thinks and bool(instance.thinking_dict)
    has_model = has_model or kind.integration in _DEPLOYMENTS
    return ("model",) * (not has_model) + ("max_output_tokens",) * (not has_limit)


def write(instance: Any, settings: dict[str, Any], asked: str, granted: Reservation) -> None:
    """Put what was granted into the settings of the call, in place, where it differs from what it asks for."""
    if granted.model != asked:
        settings["model"] = granted.model
    if not granted.capped:
        return
    kind, own = kind_of(type(instance)), mapping(instance, "additional_kwargs")
    if not kind.api:  # a stream that is stopped by its reader has no other maximum
        return
    names = _limit_names(instance, kind, own, settings)
    limits = dict.fromkeys(names, granted.max_output_tokens)
    if kind.api == "chat" and _is_fixed(instance, own):
        settings["extra_body"] = {**(settings.get("extra_body") or {}), **limits}  # the SDK lays it over the rest
    else:
        settings.update(limits)


def ask_usage(instance: Any, settings: dict[str, Any]) -> bool:
    """Have a stream of OpenAI's chat client state its usage, unless the user has said whether it should; whether it was done."""
    own, body = mapping(instance, "additional_kwargs"), settings.get("extra_body") or {}
    if "stream_options" in {**own, **settings, **body, **(own.get("extra_body") or {})}:
        return False
    asked = {"include_usage": True}
    if "extra_body" in own:  # the one of the call would take its place
        settings["stream_options"] = asked
    else:  # the SDK hands it on as it is, where it would look long for how to write options of its own
        settings["extra_body"] = {**body, "stream_options": asked}
    return True


def _is_fixed(instance: Any, own: Mapping[str, Any]) -> bool:
    """Whether OpenAI's chat client takes the maximum from the object, whatever the call says."""
    return instance.max_tokens is not None or any(name in own for name in OUTPUT_LIMITS)


def _limit_names(instance: Any, kind: Kind, own: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The names by which the request will state its maximum."""
    named = [name for name in OUTPUT_LIMITS if name in settings or (kind.api == "chat" and name in own)]
    if kind.api != "chat" or not _is_fixed(instance, own):
        return named or [_LIMITS[kind.api]]
    reasons = instance.model in getattr(sys.modules[OPENAI_CHAT], "O1_MODELS", ())
    if instance.max_tokens is not None:
        named.append("max_tokens")
    return ["max_completion_tokens"] if reasons else list(dict.fromkeys(named))
