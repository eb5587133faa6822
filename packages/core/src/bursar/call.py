"""One call: what its maker says of it, what the guard learns of it, and the steps of its life."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from bursar.commands import Command
from bursar.errors import InvalidInput
from bursar.estimate import Estimate, Request
from bursar.prices import ModelPrice
from bursar.scope import Scope
from bursar.usage import Usage
from bursar.waiting import Ticket

MODEL_UNITS = ("USD", "tokens", "requests", "slots")
TOOL_UNITS = ("USD", "calls", "slots")
CHARGE_UNITS = ("USD",)
TTL_S = 600.0
MAX_TTL_S = 86_400.0


class CallOptions(TypedDict, total=False):
    """What may be said of a model call before it is sent.

    `messages` or the whole request `body`, or its `input_tokens`: what will be sent. `max_output_tokens`: the maximum that the
    request sets (it must be enforced), read from the body where not given. `n`: answers asked for; `retries`: the client's own;
    `endpoint`: the provider's path where it matters. `resize`: whether a smaller maximum output than asked for may be granted
    (default: only where none was set). `connection`: what the call goes through (default: the provider). `tags` win over the
    scope's, `default_tags` do not. `usage`: what it will be billed where that is not tokens (images, seconds, characters); it is
    believed, as `input_tokens` are. `id` makes the reservation repeatable; `ttl_s`: seconds until it expires (default 600).
    """

    messages: str | Sequence[Any] | None
    input_tokens: int | None
    max_output_tokens: int | None
    body: Mapping[str, Any] | None
    n: int
    retries: int
    endpoint: str | None
    usage: Usage | None
    resize: bool | None
    connection: str | None
    tags: Mapping[str, str] | None
    default_tags: Mapping[str, str] | None
    id: str | None
    ttl_s: float


class ToolOptions(TypedDict, total=False):
    """What may be said of a tool call or a charge, as for CallOptions."""

    connection: str | None
    tags: Mapping[str, str] | None
    default_tags: Mapping[str, str] | None
    id: str | None
    ttl_s: float


class Pause(NamedTuple):
    """Wait until the ticket is woken, `seconds` at most."""

    ticket: Ticket
    seconds: float


class Reload(NamedTuple):
    """Read the policy from the store again: another process has published a newer version."""


Step = Command | Pause | Reload
Steps = Generator[Step, Any, Any]


class Call:
    """One call and all that the guard knows of it.

    `state`: new, open, settled, released, or unguarded (the store was away and the policy is "open"). `amounts` are those of a
    tool call; a model call's come from the `usage` that its maker gave, else from its `request`, `price` and estimate.
    """

    __slots__ = (
        "amounts",
        "attempts",
        "capped",
        "connection",
        "draft",
        "estimate",
        "given_id",
        "id",
        "model",
        "price",
        "provider",
        "request",
        "reserved_us",
        "resize",
        "scope",
        "service_tier",
        "state",
        "tool",
        "ttl_us",
        "units",
        "usage",
    )

    def __init__(
        self, id: str, scope: Scope, units: tuple[str, ...], *, ttl_s: float = TTL_S, given_id: bool = False
    ) -> None:
        if not isinstance(ttl_s, (int, float)) or not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidInput(f"ttl_s must be from 1 to {MAX_TTL_S:.0f} seconds, got {ttl_s!r}.", argument="ttl_s")
        self.id = check_id(id) if given_id else id
        self.given_id = given_id
        self.scope = scope
        self.units = units
        self.ttl_us = int(ttl_s * 1e6)
        self.provider = self.model = self.tool = self.connection = ""
        self.request: Request | None = None
        self.usage: Usage | None = None
        self.resize = False
        self.service_tier: str | None = None
        self.price: ModelPrice | None = None
        self.estimate: Estimate | None = None
        self.amounts: dict[str, int] = {}
        self.attempts = 1
        self.draft: dict[str, Any] = {}
        self.reserved_us = 0
        self.capped = False
        self.state = "new"

    @property
    def run(self) -> str:
        return self.scope.tags["run"]

    def tags(self) -> dict[str, str]:
        """The scope's tags and the call's own."""
        own = {"provider": self.provider, "model": self.model, "tool": self.tool, "connection": self.connection}
        return {**self.scope.tags, **{tag: value for tag, value in own.items() if value}}

    def digest(self, *more: object) -> str:
        """What must be the same when an id is used again (I6); nothing where nobody can use it again."""
        if not self.given_id:
            return ""
        facts: tuple[object, ...] = (self.tags(), self.scope.runs, self.amounts, *more)
        if self.request is not None:
            request = self.request
            facts += (request.size, request.input_tokens, request.n, request.retries)
        return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def check_id(id: object) -> str:
    """The id of a reservation. Raises InvalidInput for one that the stores keep for themselves, or that cannot be printed."""
    if (
        isinstance(id, str)
        and 0 < len(id) <= 200
        and id.isprintable()
        and id[0] not in "[#@"
        and not set(id) & set("~!")
    ):
        return id
    raise InvalidInput(
        f"{id!r} cannot be an id. Use 1 to 200 printable characters without ~ and !, not starting with [, # or @.",
        argument="id",
    )
