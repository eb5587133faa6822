"""The logger of the LiteLLM proxy: `callbacks: bursar_litellm.proxy.logger`, made from the environment when it is asked for."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from typing import Any

import litellm

from bursar import Bursar
from bursar.errors import InvalidInput
from bursar_litellm.answer import read_answer, read_error
from bursar_litellm.errors import check_bounded
from bursar_litellm.gate import Admission
from bursar_litellm.logger import BursarLogger
from bursar_litellm.request import FREE, LIMIT_NAMES, PROMPTS, ask_for_usage_in, changeable, kind_of, read_tags, write

_ROUTE_MODEL = re.compile(r"/models?/([^/:?]+)")  # Google's and AWS's paths name the model
_UPLOAD = re.compile(r"/(audio/(transcriptions|translations)|images/(edits|variations))$")
_LATER = {  # by the path, and by the name that `check_bounded` has for it
    re.compile(r"(/batches|/batchPredictionJobs|:batchGenerateContent)$"): "create_batch",
    re.compile(r"/fine_tuning/jobs$"): "create_fine_tuning_job",
    re.compile(r"/evals/[^/]+/runs$"): "create_run",
    re.compile(r"/realtime/(client_secrets|sessions|transcription_sessions|calls)$"): "realtime_calls",
    re.compile(r"/videos$"): "create_video",
}
_GATEWAY = "gateway"  # whoever sells the model: its price is looked for at the makers'


class ProxyLogger(BursarLogger):
    """A BursarLogger for the proxy: it also holds the requests that the proxy passes on as they are, and says who asks.

    What a virtual key, its team, user and organisation are goes into the tags `key`, `team`, `user` and `org`, the end
    user into `customer`, LiteLLM's tags into `tag.NAME`; clients may add others by `metadata={"bursar": {...}}`.
    """

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any
    ) -> dict[str, Any] | None:
        """Reserve for a request that is passed on as it is; refuse what cannot be held against a budget."""
        check_bounded(kind_of(call_type))
        if str(getattr(call_type, "value", call_type)) != "pass_through_endpoint":
            return None
        route = str(getattr(user_api_key_dict, "request_route", None) or "")
        body = {name: value for name, value in data.items() if not name.startswith("litellm_")}
        _check_route(route, body)
        named = _ROUTE_MODEL.search(route)
        model = named[1] if named else data.get("model")
        if not body or FREE.search(route) or not (model or any(name in body for name in PROMPTS)):
            return None  # a list, a file, a lookup: no model is asked
        attempt = self.gate.enter(_call_id(data))
        if attempt is None:
            return None
        with Admission(attempt):
            attempt.provider, model = _seller(route, str(model or ""))
            if named:
                body.pop("model", None)  # whatever it says there
            request = {
                "provider": attempt.provider,
                "model": model,
                "body": body,
                "endpoint": route,
                "resize": False,
                "changeable": _changeable(attempt.provider, model, body),
                "default_tags": read_tags({"metadata": _identity(user_api_key_dict)}, self.tags),
            }
            data = {**write("completion", data, model, await attempt.areserve(request))}
        if "chat/completions" in route or attempt.provider in ("openai", _GATEWAY):
            ask_for_usage_in(data)
        return data

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The end of a request that was passed on, in the provider's own words where they were kept."""
        payload, attempt = kwargs.get("passthrough_logging_payload"), self.gate.find(kwargs.get("litellm_call_id"))
        if not isinstance(payload, Mapping) or attempt is None:
            await super().async_log_success_event(kwargs, response_obj, start_time, end_time)
            return
        answer = payload.get("response_body") or _told(response_obj)
        await self.gate.aend(attempt, read_answer(attempt.provider, answer, None, 0))

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """The failed end of a request that was passed on."""
        attempt = self.gate.find(_call_id(request_data))
        if attempt is not None and attempt.door is None:
            await self.gate.aend(attempt, read_error(attempt.provider, original_exception, None))


def _check_route(route: str, body: Mapping[str, Any]) -> None:
    """Raise UnboundedEstimate for a request whose cost does not come with its answer, or that the proxy does not show."""
    if not body and _UPLOAD.search(route):
        check_bounded("upload_passed_on")
    if "assistant_id" in body:  # the proxy takes `runs` in the path for a thread's id
        check_bounded("run_thread")
    for path, kind in _LATER.items():
        if body and path.search(route):
            check_bounded(kind)


def _changeable(provider: str, model: str, body: Mapping[str, Any]) -> tuple[str, ...]:
    """What can be changed of a request that is passed on: of a chat that names its model, that and the maximum that it sets."""
    if "messages" not in body:
        return ()
    can_change = changeable("completion", provider, model, body)
    is_limited = any(body.get(name) for name in LIMIT_NAMES)
    return tuple(name for name in can_change if name == "model" or is_limited)


def _told(response_obj: Any) -> Any:
    """The answer to a request that was passed on. A stream of a host that LiteLLM does not know comes as a list's text."""
    text = response_obj.get("response") if isinstance(response_obj, Mapping) else None
    if not isinstance(text, str):
        return response_obj
    _, is_list, lines = text.partition("Chunks=[")
    if not is_list:
        return text
    try:
        chunks = ast.literal_eval(f"[{lines}")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # not the list after all: then no usage is read, and the worst case is booked
    return [chunk for chunk in chunks if isinstance(chunk, str) and chunk.startswith("data:")]


def _call_id(data: Mapping[str, Any]) -> str:
    notes = data.get("litellm_logging_obj")
    return str(getattr(notes, "litellm_call_id", None) or data.get("litellm_call_id"))


def _seller(route: str, model: str) -> tuple[str, str]:
    """Who is asked, by the first part of the route (`/anthropic/v1/messages`), else by the model's name; and the model."""
    first = route.strip("/").partition("/")[0]
    if first in litellm.provider_list:
        return first, model
    try:
        plain, provider, _, _ = litellm.get_llm_provider(model)
    except Exception:  # noqa: BLE001 - LiteLLM's error for a name it does not know; the price book may know it
        return _GATEWAY, model
    return provider, plain


def _identity(key: Any) -> dict[str, Any]:
    names = {"hash": "api_key", "alias": "key_alias", "org_id": "org_id"}
    names |= {name: name for name in ("team_id", "team_alias", "user_id", "end_user_id")}
    return {f"user_api_key_{name}": getattr(key, attribute, None) for name, attribute in names.items()}


def make_logger() -> ProxyLogger:
    """The logger that the environment describes.

    BURSAR_POLICY is the path of a policy file; BURSAR_STORE overrides the store that it names, or stands alone, for a
    store where the budgets are published already. Workers that share the store share the budgets. Raises InvalidInput
    when neither is set, and what `Bursar.from_policy` raises.
    """
    policy, store = os.environ.get("BURSAR_POLICY"), os.environ.get("BURSAR_STORE")
    if policy:
        return ProxyLogger(Bursar.from_policy(policy))
    if store:
        return ProxyLogger(Bursar(store))
    raise InvalidInput(
        "The proxy's logger knows no budgets. Set BURSAR_POLICY to a policy file, or BURSAR_STORE to a store with budgets.",
        argument="BURSAR_POLICY",
    )


def __getattr__(name: str) -> Any:
    if name != "logger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    logger = globals()["logger"] = make_logger()
    return logger
