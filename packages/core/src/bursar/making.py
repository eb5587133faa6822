"""Making calls of what callers say: scope, tags, ids and the request, checked before anything else happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from bursar.answers.counts import word
from bursar.call import CHANGEABLE, MODEL_UNITS, TOOL_UNITS, Call
from bursar.errors import InvalidInput, shown
from bursar.estimate import Request
from bursar.guard import Guard
from bursar.reservation import tool_cost
from bursar.scope import Scope, active, check_tags, process_run
from bursar.stores.base import Store
from bursar.usage import Usage

_NO_SCOPE = Scope({})  # outside of any


class CallMaker:
    """Makes the calls of one Bursar. `tags`: on every call that has no such tags of its own; `ids`: new ones, for tests."""

    def __init__(self, guard: Guard, store: Store, tags: dict[str, str], ids: Callable[[], str] | None) -> None:
        self._guard = guard
        self._store = store
        self._tags = tags
        self._ids = ids

    def model(
        self,
        provider: str,
        model: str,
        *,
        resize: bool | None = None,
        region: str | None = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = 600.0,
        changeable: Collection[str] = CHANGEABLE,
        body: Mapping[str, Any] | None = None,
        usage: Usage | None = None,
        **said: Any,
    ) -> Call:
        """A call of a model, as CallOptions say. Raises InvalidInput."""
        own = _texts(provider=provider, model=model, connection=connection or provider)
        messages = said.get("messages")
        if messages is not None and not isinstance(messages, (str, Sequence)):
            raise InvalidInput(
                f"messages cannot be {shown(messages)}. Give the text, or the list of messages, as it will be sent.",
                argument="messages",
            )
        call = self._call(MODEL_UNITS, tags, default_tags, id, ttl_s)
        call.provider, call.model, call.connection = own["provider"], own["model"], own["connection"]
        call.request, call.usage = Request(provider, model, body=body, **said), usage
        call.resize = call.request.max_output_tokens is None if resize is None else resize
        call.changeable = changeable
        call.content = body if messages is None else messages  # a body beside messages holds none
        asked = body if isinstance(body, Mapping) else {}
        call.service_tier = _tier(asked)
        call.region = word(asked.get("inference_geo")) if region is None else _texts(region=region)["region"]
        call.asked = (call.request.max_output_tokens, call.service_tier, call.region, usage)
        return call

    def tool(
        self,
        name: str,
        *,
        cost: str | None = None,
        arguments: Any = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = 600.0,
    ) -> Call:
        """A call of a tool, as ToolOptions say. Raises InvalidInput."""
        price = tool_cost(cost)
        own = _texts(tool=name, connection=connection or name)
        call = self._call(TOOL_UNITS, tags, default_tags, id, ttl_s)
        call.tool, call.connection, call.content = own["tool"], own["connection"], arguments
        call.amounts = {"USD": (call.book.tool_price(name) or 0) if price is None else price}
        return call

    def _call(
        self,
        units: tuple[str, ...],
        tags: Mapping[str, str] | None,
        default_tags: Mapping[str, str] | None,
        id: str | None,
        ttl_s: float,
    ) -> Call:
        scope = self._scope(tags, default_tags)
        call_id = self.id() if id is None else id
        return Call(call_id, scope, units, self._guard.book, ttl_s=ttl_s, given_id=id is not None)

    def id(self) -> str:
        """A new id. Ids rise with time, so that records are appended where the table ends."""
        return self._ids() if self._ids is not None else f"{self._store.now_us():014x}-{os.urandom(8).hex()}"

    def _scope(self, tags: Mapping[str, str] | None, defaults: Mapping[str, str] | None) -> Scope:
        scope = active()
        if scope is None:
            scope = _NO_SCOPE
        elif "run" in scope.tags and not (tags or defaults or self._tags):
            return scope
        # the innermost explicit scope's run, else the caller's (a framework's), else one per process
        return scope.with_tags(
            check_tags(tags) if tags else {},
            {"run": process_run(), **self._tags, **(check_tags(defaults) if defaults else {})},
        )


def _tier(body: Mapping[str, Any]) -> str | None:
    """The service tier that a request asks for: OpenAI's and Google's word, Bedrock's object, Anthropic's speed."""
    if _TIERS.isdisjoint(body):
        return None
    speed = word(body.get("speed"))
    if speed and speed != "standard":
        return speed
    asked = body.get("service_tier") or body.get("serviceTier")
    return word(asked.get("type") if isinstance(asked, Mapping) else asked)


_TIERS = frozenset({"service_tier", "serviceTier", "speed"})


def _texts(**given: object) -> dict[str, str]:
    """Names that a call cannot do without, checked as the tags that they become. Raises InvalidInput."""
    for argument, value in given.items():
        if not isinstance(value, str):
            raise InvalidInput(f"{argument} cannot be {shown(value)}. Give its name as text.", argument=argument)
    return _checked(*given, *given.values())


@lru_cache(maxsize=1_024, typed=True)  # an enumeration's member equals its value, and is another text
def _checked(*names_and_values: str) -> dict[str, str]:
    count = len(names_and_values) // 2
    return check_tags(dict(zip(names_and_values[:count], names_and_values[count:], strict=True)))
