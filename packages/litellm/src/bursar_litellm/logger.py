"""The custom logger: reserves where LiteLLM announces a call, raises where a budget refuses, settles what nothing else ends."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import litellm
from litellm.exceptions import BadRequestError
from litellm.integrations.custom_logger import CustomLogger

from bursar.ending import Ending, released, unknown
from bursar.sending import Sending, passing
from bursar_litellm.answer import read_answer, read_error
from bursar_litellm.door import is_mocked, open_door
from bursar_litellm.errors import BudgetStop, check_bounded
from bursar_litellm.functions import wrap_functions
from bursar_litellm.gate import Admission, Attempt, Gate
from bursar_litellm.media import spoken_characters
from bursar_litellm.request import (
    ENDPOINTS,
    LIMITS,
    ask_for_usage,
    clean,
    is_async,
    kind_of,
    kind_on_wire,
    limit_output,
    read_arguments,
    read_tags,
    read_wire,
    write,
)

if TYPE_CHECKING:
    from bursar import Bursar

_NO_UPSTREAM = "litellm_no_upstream_llm_call"  # in LiteLLM's notes: its proxy tells of a call that it refused


class BursarLogger(CustomLogger):
    """Holds every call of LiteLLM in this process against the budgets of `bursar`, once it is one of its callbacks.

    `litellm.callbacks.append(BursarLogger(bursar))`, or see `install`, and `bursar_litellm.proxy` for the proxy. `tags`
    are added to every call; `metadata={"bursar": {"agent": "planner"}}` adds more to one; a scope's own tags win over
    both. A refused call raises LiteLLMBudgetExceeded, and the other errors of `Bursar.reserve` come as they are, before
    anything is sent; never later.

    Making one also puts thin wrappers around the functions of `litellm`: they end what this logger has reserved as soon
    as the call or its stream ends, and raise in sync calls, where no callback can. Without it they do nothing.
    """

    def __init__(self, bursar: Bursar, **tags: str) -> None:
        super().__init__()
        self.bursar = bursar
        self.tags = clean(tags)
        self.gate = Gate.of(bursar)
        wrap_functions()

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until every call that was announced has ended, in the background too; False when that takes longer.

        For the end of a program, before `bursar.close()`: a stream that was dropped is booked a moment later.
        """
        return self.gate.drain(timeout_s)

    # -- before: while a call's arguments can be changed ---------------------------------------------------------

    def announce(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Reserve for a sync call of this function of `litellm`; its arguments, with the model and maximum that were granted."""
        kind = kind_of(name)
        request = self._read(kind, kwargs) if kind in LIMITS and not _may_be_cached(kwargs) else None
        attempt = None if request is None else self._enter(kwargs)
        if request is None or attempt is None:
            return kwargs  # what has nothing to change is reserved for where it goes out
        with Admission(attempt):
            self._prepare(attempt, kind, request, kwargs)
            return write(kind, kwargs, request["model"], attempt.reserve(request))

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any] | None:
        """The same for an awaited call, once per attempt; None where nothing of it was announced or changed."""
        kind = kind_of(call_type)
        request = self._read(kind, kwargs) if is_async(call_type) else None
        attempt = None if request is None else self._enter(kwargs)
        if request is None or attempt is None:
            return None
        with Admission(attempt):
            self._prepare(attempt, kind, request, kwargs)
            return write(kind, kwargs, request["model"], await attempt.areserve(request))

    def _read(self, kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """What to reserve for a call with these arguments; None where it is to be reserved for where it goes out, or never."""
        door = open_door()
        if is_mocked(kind, kwargs) or (door is not None and door.is_free(self.bursar)):
            return None
        if kwargs.get("fallbacks") or kwargs.get("model_list"):
            return None  # each of the models that are tried is announced by itself
        check_bounded(kind)
        model = kwargs.get("model")
        if kind not in ENDPOINTS or kind == "llm_passthrough_route" or not model or model in litellm.model_alias_map:
            return None  # without its name, as it came by position, or by another than LiteLLM will send
        try:
            return read_arguments(kind, kwargs)
        except BadRequestError:
            return None  # LiteLLM will refuse it too, or knows better where it goes out

    def _enter(self, kwargs: Mapping[str, Any]) -> Attempt | None:
        """A new attempt for the call with these arguments; None where it is reserved for already."""
        notes = kwargs.get("litellm_logging_obj")
        return self.gate.enter(getattr(notes, "litellm_call_id", None) or str(kwargs.get("litellm_call_id")))

    # -- before: every call, at the moment when it goes out -------------------------------------------------------

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Any) -> None:
        """Reserve for a call that was not announced: a sync one, or an attempt of LiteLLM's own after a failure."""
        try:
            self._dispatch(kwargs)
        except Exception as error:
            # LiteLLM logs an Exception and sends the call all the same: nothing of ours may end like that (I12).
            raise BudgetStop(error) from error

    def _dispatch(self, details: dict[str, Any]) -> None:
        kind, door = kind_on_wire(details), open_door()
        if _NO_UPSTREAM in details or (door is not None and door.is_free(self.bursar)):
            return
        check_bounded(kind)
        if kind not in ENDPOINTS:
            return
        key = str(details.get("litellm_call_id"))
        attempt, moment = self.gate.find(key), details.get("api_call_start_time")
        if attempt is not None and attempt.is_sent and attempt.moment is moment:
            return  # told by another logger of the same guard
        if attempt is None or attempt.is_sent:
            if door is None and self._is_held(details):
                return
            attempt = self.gate.enter(key)
            assert attempt is not None
            with Admission(attempt):
                settings = {**(details.get("optional_params") or {}), **(details.get("litellm_params") or {})}
                granted = attempt.reserve(self._prepare(attempt, kind, read_wire(kind, details), settings))
            if granted.capped and granted.max_output_tokens:
                limit_output(kind, details, granted.max_output_tokens)
        if isinstance(details.get("original_response"), str):
            details["original_response"] = None  # an earlier attempt's
        details.pop("exception", None)
        attempt.handling = id(sys.exception())
        attempt.details, attempt.moment, attempt.is_sent = details, moment, True
        attempt.hides_usage = ask_for_usage(details)
        attempt.sending = Sending(self.bursar, str(details.get("model")), details).begin()
        if door is None:
            self.gate.early.set(attempt.sending)

    def _is_held(self, details: dict[str, Any]) -> bool:
        """Whether a framework around LiteLLM has reserved for this call of a function that no wrapper stands around."""
        earlier = self.gate.early.get()
        if earlier is not None:
            earlier.end()
        with passing(self.bursar, str(details.get("model")), details) as is_held:
            return is_held

    def _prepare(
        self, attempt: Attempt, kind: str, request: dict[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Complete the request by the call's tags, and note in the attempt what its end will be read by."""
        attempt.provider = request["provider"]
        if "usage" in request:
            attempt.characters = spoken_characters(kind, request["body"])
        request["default_tags"] = read_tags(settings, self.tags)
        return request

    # -- after: calls of functions that were taken out of `litellm` before they were wrapped -----------------------

    async def async_post_call_success_deployment_hook(self, request_data: Any, response: Any, call_type: Any) -> None:
        """The end of an awaited call: told at once, where LiteLLM's other events may be lost with the event loop."""
        attempt = self._unowned(_details(request_data))
        if attempt is not None:
            await self.gate.aend(attempt, _read_answer(attempt, response, {}))

    async def async_post_call_failure_deployment_hook(
        self, request_data: Any, exception: Exception, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        """The failed end of an awaited call."""
        attempt = self._unowned(_details(request_data))
        if attempt is not None:
            await self.gate.aend(attempt, read_error(attempt.provider, exception, attempt.details))

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The end of a sync call or stream, told from another thread."""
        attempt = self._unowned(kwargs)
        if attempt is not None:
            self.gate.end(attempt, _read_answer(attempt, response_obj, kwargs))

    def log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The failed end of a sync call or stream, told from another thread."""
        attempt = self._unowned(kwargs)
        if attempt is not None:
            self.gate.end(attempt, _read_failure(attempt, kwargs))

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The end of an awaited stream."""
        attempt = self._unowned(kwargs)
        if attempt is not None:
            await self.gate.aend(attempt, _read_answer(attempt, response_obj, kwargs))

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The failed end of an awaited stream."""
        attempt = self._unowned(kwargs)
        if attempt is not None:
            await self.gate.aend(attempt, _read_failure(attempt, kwargs))

    def _unowned(self, details: Mapping[str, Any]) -> Attempt | None:
        """The open attempt of this call, if no wrapper ends it: LiteLLM's events come late, twice or never."""
        attempt = self.gate.find(details.get("litellm_call_id"))
        return attempt if attempt is not None and attempt.door is None else None


def _may_be_cached(kwargs: Mapping[str, Any]) -> bool:
    """Whether LiteLLM may answer it out of its cache, which costs nothing, and is known just before it would go out."""
    return litellm.cache is not None and kwargs.get("caching") is not False


def _details(request_data: Mapping[str, Any]) -> Mapping[str, Any]:
    notes = request_data.get("litellm_logging_obj")
    return getattr(notes, "model_call_details", None) or request_data


def _read_answer(attempt: Attempt, answer: Any, event: Mapping[str, Any]) -> Ending:
    if event.get("cache_hit"):
        return released("answered from LiteLLM's cache")
    return read_answer(attempt.provider, answer, attempt.details, attempt.characters)


def _read_failure(attempt: Attempt, event: Mapping[str, Any]) -> Ending:
    """The end that a failure event tells of. A stream that has begun was accepted: no status frees it any more."""
    error = event.get("exception")
    if event.get("completion_start_time") is not None or not isinstance(error, BaseException):
        return unknown(type(error).__name__)
    return read_error(attempt.provider, error, attempt.details)
