"""Scope: who and what a call belongs to, as tags along a path of nested scopes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from urllib.parse import quote, unquote

from bursar.errors import InvalidInput, shown

TAGS = (
    "org",
    "team",
    "project",
    "user",
    "customer",
    "workflow",
    "agent",
    "run",
    "tool",
    "connection",
    "model",
    "provider",
)
_KNOWN = frozenset(TAGS)
MAX_TAGS = 64
MAX_VALUE_LENGTH = 512
MAX_DEPTH = 32
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,63}")


def check_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """The tags as text, without those that are None. Raises InvalidInput for names and values that no store should hold."""
    checked: dict[str, str] = {}
    if not isinstance(tags, (dict, Mapping)):
        raise InvalidInput(f'Tags cannot be {shown(tags)}. Give them as {{"team": "research"}}.', argument="tags")
    for name, value in tags.items():
        if type(value) is str and name in _KNOWN and 0 < len(value) <= MAX_VALUE_LENGTH and value.isprintable():
            checked[name] = value
            continue
        if value is None:
            continue
        if not isinstance(name, str) or (name not in _KNOWN and not _NAME.fullmatch(name)):
            raise InvalidInput(
                f"{shown(name)} cannot name a tag. Use letters, digits and _.:/- (64 at most).", argument=shown(name)
            )
        try:
            text = str(value)
        except ValueError:  # an integer of thousands of digits
            text = ""
        if not text or len(text) > MAX_VALUE_LENGTH or not text.isprintable():
            raise InvalidInput(
                f"The tag {name} cannot be {text[:40]!r}. Use 1 to {MAX_VALUE_LENGTH} printable characters.",
                argument=name,
            )
        checked[name] = text
    if len(checked) > MAX_TAGS:
        raise InvalidInput(f"A call cannot have more than {MAX_TAGS} tags. Drop some.", argument="tags")
    return checked


class Scope:
    """Tags along a path: `tags` are those in force, `path` the tags in force at each level, outermost first.

    `limits` are (tags at the level, limit text) of scopes that were opened with a budget of their own.
    """

    __slots__ = ("_key", "_like", "_runs", "limits", "path", "tags")

    def __init__(self, tags: dict[str, str], parent: Scope | None = None, limit: str | None = None) -> None:
        self.tags: dict[str, str] = tags if parent is None else {**parent.tags, **tags}
        self.path: tuple[dict[str, str], ...] = (self.tags,) if parent is None else (*parent.path, self.tags)
        if len(self.path) > MAX_DEPTH:
            raise InvalidInput(f"Scopes nest at most {MAX_DEPTH} deep. Close inner scopes first.", argument="scope")
        self.limits: tuple[tuple[dict[str, str], str], ...] = () if parent is None else parent.limits
        if limit is not None:
            self.limits = (*self.limits, (self.tags, limit))
        self._key = ""
        self._like: Scope | None = None
        self._runs: tuple[str, ...] | None = None

    def with_tags(self, tags: dict[str, str], defaults: Mapping[str, str]) -> Scope:
        """The same scope with more tags at its innermost level: `tags` win over its own, `defaults` do not."""
        leaf = {**defaults, **self.tags, **tags}
        if leaf == self.tags:
            return self
        scope = self._like  # as the last call had it: one handler's calls mostly have the same
        if scope is None or scope.tags != leaf:
            scope = Scope.__new__(Scope)
            scope.tags = leaf
            scope.path = (*self.path[:-1], leaf)
            scope.limits = self.limits
            scope._key = ""
            scope._like = scope._runs = None
            self._like = scope
        return scope

    def as_text(self) -> str:
        """The scope as JSON, for another process."""
        return json.dumps([self.path, self.limits], ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Scope:
        """The scope that `as_text` gave, in whatever process. Raises InvalidInput."""
        try:
            path, limits = json.loads(text)
            if not path or len(path) > MAX_DEPTH:
                raise ValueError
            scope = cls.__new__(cls)
            scope.path = tuple(check_tags(tags) for tags in path)
            scope.limits = tuple((check_tags(tags), str(limit)) for tags, limit in limits)
        except (ValueError, TypeError, RecursionError):
            raise InvalidInput(
                f"{str(text)[:60]!r} is no scope of another process. Hand on what `scope_environ()` or `scope_headers()` gave.",
                argument="carried",
            ) from None
        scope.tags, scope._key = scope.path[-1], ""
        scope._like = scope._runs = None
        return scope

    @property
    def key(self) -> str:
        """What scopes of the same path and limits have in common."""
        key = self._key
        if not key:
            key = self._key = repr((self.path, self.limits))
        return key

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs along the path, outermost first, each once."""
        runs = self._runs
        if runs is None:
            runs = self._runs = tuple(dict.fromkeys(tags["run"] for tags in self.path if "run" in tags))
        return runs


current: ContextVar[Scope | None] = ContextVar("bursar_scope", default=None)


ENVIRONMENT = "BURSAR_SCOPE"
HEADER = "baggage"  # W3C Baggage, https://www.w3.org/TR/baggage/
MAX_BAGGAGE = 8_192
_MEMBER = "bursar.scope="


def active() -> Scope | None:
    """The innermost scope of this thread or task, else the one that the process was started in."""
    scope = current.get()
    if scope is None and (text := os.environ.get(ENVIRONMENT)):
        scope = _inherited(text)
    return scope


@lru_cache(maxsize=16)
def _inherited(text: str) -> Scope:
    return Scope.from_text(text)


def to_baggage(scope: Scope) -> str:
    """The scope as a member of a W3C `baggage` header. Raises InvalidInput where the header would be too long."""
    member = _MEMBER + quote(scope.as_text(), safe="")
    if len(member) > MAX_BAGGAGE:
        raise InvalidInput(
            f"The scope takes {len(member)} bytes of a header's {MAX_BAGGAGE}. Drop tags.", argument="scope"
        )
    return member


def from_carried(text: str) -> Scope:
    """The scope in a `baggage` header, or in the text of the environment variable. Raises InvalidInput."""
    for member in text.split(","):
        value = member.strip().partition(";")[0]
        if value.startswith(_MEMBER):
            return Scope.from_text(unquote(value.removeprefix(_MEMBER)))
    return Scope.from_text(text)


def process_run() -> str:
    """The run of calls that no scope and no framework gives one: one per process."""
    return f"process-{os.getpid()}"
