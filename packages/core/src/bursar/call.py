"""One call: what its maker says of it, what the guard learns of it, and the steps of its life."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from bursar.commands import Command
from bursar.errors import InvalidInput, shown
from bursar.estimate import Estimate, Request
from bursar.prices import ModelPrice, PriceBook
from bursar.scope import Scope
from bursar.usage import Usage
from bursar.waiting import Ticket

if TYPE_CHECKING:
    from bursar.errors import Stopped
    from bursar.policy import Matched, Policy

CHANGEABLE = ("model", "max_output_tokens")
MODEL_UNITS = ("USD", "tokens", "requests", "failures", "slots")
TOOL_UNITS = ("USD", "calls", "failures", "slots")
CHARGE_UNITS = ("USD",)
TTL_S = 600.0
MAX_TTL_S = 86_400.0


class CallOptions(TypedDict, total=False):
    """What may be said of a model call before it is sent.

    `messages` or the whole request `body`, or its `input_tokens`: what will be sent. `max_output_tokens`: the maximum that
    the request sets (it must be enforced), read from the body where not given. `n`: answers asked for; `retries`: the
    client's own; `endpoint`: the provider's path where it matters. `resize`: whether a smaller maximum output than asked
    for may be granted (default: only where none was set). `changeable`: what of the request the caller sends as granted, of
    "model" and "max_output_tokens" (default: both); a budget's thresholds may change these. `connection`: what the call
    goes through (default: the provider). `tags` win over the scope's, `default_tags` do not. `usage`: what it will be
    billed where that is not tokens (images, seconds, characters); it is believed, as `input_tokens` are. `region`: where it is
    served, if that has a price of its own ("eu", "us-east5") and neither request nor answer says it. `id` makes the
    reservation repeatable; `ttl_s`: seconds until it expires (default 600).
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
    changeable: Collection[str]
    region: str | None
    connection: str | None
    tags: Mapping[str, str] | None
    default_tags: Mapping[str, str] | None
    id: str | None
    ttl_s: float


class ToolOptions(TypedDict, total=False):
    """What may be said of a tool call or a charge, as for CallOptions. `arguments`: what the tool is called with, for detectors."""

    arguments: Any
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


class Publish(NamedTuple):
    """Put definitions into the store, for every process."""

    kind: str
    definitions: dict[str, dict[str, Any]]


Step = Command | Pause | Reload | Publish
Steps = Generator[Step, Any, Any]


class Call:
    """One call and all that the guard knows of it.

    `state`: new, open, settled, released, or unguarded (the store was away and the policy is "open"). `amounts` are those of a
    tool call; a model call's come from the `usage` that its maker gave, else from its `request`, `price` and estimate. `book`:
    the prices that it is reserved, settled and recorded by, though others may be in force meanwhile.
    `asked`: what its maker asked for, and thresholds or want of room may have changed since. `complied`: by account key, up to
    which mark the call does what thresholds ask for; `actions` says what that was, `model_asked` the model that another took the
    place of, `throttles` the accounts of rates. `stopped`: set while the call is in flight, when a switch or a budget stops it.
    `content`: the request, or a tool's arguments, for the detectors alone. `lost`: attempts of the client's own, before its last
    one, that may have been billed and were never answered.
    """

    __slots__ = (
        "_tags",
        "actions",
        "amounts",
        "asked",
        "attempts",
        "book",
        "capped",
        "changeable",
        "complied",
        "connection",
        "content",
        "draft",
        "estimate",
        "given_id",
        "id",
        "looked",
        "lost",
        "matched",
        "model",
        "model_asked",
        "price",
        "provider",
        "region",
        "request",
        "reserved_us",
        "resize",
        "scope",
        "service_tier",
        "state",
        "stopped",
        "throttles",
        "tool",
        "ttl_us",
        "units",
        "usage",
    )

    def __init__(
        self,
        id: str,
        scope: Scope,
        units: tuple[str, ...],
        book: PriceBook,
        *,
        ttl_s: float = TTL_S,
        given_id: bool = False,
    ) -> None:
        if not isinstance(ttl_s, (int, float)) or not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidInput(
                f"ttl_s must be from 1 to {MAX_TTL_S:.0f} seconds, got {shown(ttl_s)}.", argument="ttl_s"
            )
        self.id = check_id(id) if given_id else id
        self.given_id = given_id
        self.scope = scope
        self.units = units
        self.book = book
        self.ttl_us = int(ttl_s * 1e6)
        self.provider = self.model = self.tool = self.connection = ""
        self.request: Request | None = None
        self.content: Any = None
        self.usage: Usage | None = None
        self.resize = False
        self.service_tier: str | None = None
        self.region: str | None = None
        self.price: ModelPrice | None = None
        self.estimate: Estimate | None = None
        self.amounts: dict[str, int] = {}
        self.asked: tuple[object, ...] = ()
        self.attempts, self.lost = 1, 0
        self.draft: dict[str, Any] = {}
        self.reserved_us = 0
        self.capped = False
        self.changeable: Collection[str] = CHANGEABLE
        self.complied: dict[str, int] = {}
        self.actions: tuple[str, ...] = ()
        self.model_asked = ""
        self.throttles: tuple[Matched, ...] = ()
        self.stopped: Stopped | None = None
        # which policy, for which model, from when until, found what
        self.matched: tuple[Policy, str, int, int, tuple[Matched, ...]] | None = None
        self.looked = -1  # the version of the policy whose switches it was last held against
        self.state = "new"
        self._tags: tuple[tuple[object, ...], dict[str, str]] = (), {}  # of what, and the tags

    @property
    def run(self) -> str:
        return self.scope.tags["run"]

    def own_tags(self) -> dict[str, str]:
        """What the call itself is: provider, model, tool, connection."""
        own = {"provider": self.provider, "model": self.model, "tool": self.tool, "connection": self.connection}
        return {tag: value for tag, value in own.items() if value}

    def tags(self) -> dict[str, str]:
        """The scope's tags and the call's own; not to be changed."""
        own = self.scope, self.provider, self.model, self.tool, self.connection
        if self._tags[0] != own:
            self._tags = own, {**self.scope.tags, **self.own_tags()}
        return self._tags[1]

    def digest(self, *more: object) -> str:
        """What must be the same when an id is used again (I6); nothing where nobody can use it again."""
        if not self.given_id:
            return ""
        tags = {**self.tags(), "model": self.model_asked or self.model}  # a threshold may have swapped it since
        facts: tuple[object, ...] = (tags, self.scope.runs, self.amounts, *more)
        if self.request is not None:
            request = self.request
            facts += (request.size, request.input_tokens, request.n, request.retries, *self.asked)
        return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def check_id(id: object) -> str:
    """The id of a reservation. Raises InvalidInput for one that the stores keep for themselves, or that cannot be printed."""
    if (
        isinstance(id, str)
        and 0 < len(id) <= 200
        and id.isprintable()
        and id[0] not in "[#@^"
        and not set(id) & set("~!")
    ):
        return id
    raise InvalidInput(
        f"{shown(id)} cannot be an id. Use 1 to 200 printable characters without ~ and !, not starting with [, #, @ or ^.",
        argument="id",
    )
