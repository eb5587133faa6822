"""Past calls, read from the records: what each held, used and cost, when, and in which scope."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bursar.commands import Entry
from bursar.scope import Scope
from bursar.usage import Usage

OWN_TAGS = ("provider", "model", "tool", "connection")


@dataclass(slots=True)
class Past:
    """One call of the records. `held_*`: what was reserved for it. A call that was `blocked` used what it was reserved for.

    `kind`: settlement, release, charge or refusal; an expiry, with what corrected it, is a settlement.
    """

    id: str
    kind: str
    outcome: str
    estimated: bool
    tags: dict[str, str]
    scope: Scope
    attempts: int
    model_asked: str
    held_nanos: int
    held_usage: Usage
    cost_nanos: int
    usage: Usage
    price_version: str
    reserved_us: int
    settled_us: int

    @property
    def model(self) -> str:
        """The model that answered to the books; "" for tools and plain costs."""
        return self.tags.get("model", "")

    @property
    def tool(self) -> str:
        return self.tags.get("tool", "")

    @property
    def run(self) -> str:
        return self.tags.get("run", "")


def read_past(entries: Iterable[Entry]) -> list[Past]:
    """The calls behind these entries, in the order in which they were reserved."""
    calls: dict[str, Entry] = {}
    later: list[Entry] = []
    for entry in entries:
        if "run" not in entry.draft["tags"]:  # of a lease, which is no call
            continue
        if entry.corrects is None:
            calls[entry.id] = entry
        else:
            later.append(entry)
    for entry in later:
        if (first := calls.get(entry.corrects or "")) is not None:
            calls[first.id] = _corrected(first, entry)
    # at one instant: in the order of their ids, which rise with time
    return sorted(map(_past, calls.values()), key=lambda one: (one.reserved_us, one.id))


def _past(entry: Entry) -> Past:
    draft = entry.draft
    tags: dict[str, str] = dict(draft["tags"])
    held = draft.get("usage", {})
    refused = entry.kind == "refusal"
    return Past(
        id=entry.id,
        kind="settlement" if entry.kind == "expiry" else entry.kind,
        outcome="completed" if refused else entry.outcome,
        estimated=entry.estimated or refused,
        tags=tags,
        scope=_scope(tags, draft.get("path", ()), entry.amounts),
        attempts=draft.get("attempts", 1),
        model_asked=draft.get("model_asked", ""),
        held_nanos=draft.get("cost_nanos", 0),
        held_usage=Usage(**held),
        cost_nanos=draft.get("cost_nanos", 0) if refused else entry.cost_nanos,
        usage=Usage(**(held if refused else entry.usage)),
        price_version=draft.get("price_version", ""),
        reserved_us=entry.reserved_us,
        settled_us=entry.settled_us,
    )


def _scope(tags: Mapping[str, str], path: Iterable[str], amounts: Mapping[str, int]) -> Scope:
    """The scope as far as the records tell: the innermost tags, the runs around it, and the tags of the accounts it held.

    The outer levels' own tags are not recorded; what an account names otherwise than the call must be theirs.
    """
    leaf = {tag: value for tag, value in tags.items() if tag not in OWN_TAGS}
    outer = [{**leaf, "run": run} for run in path if run != leaf.get("run")]
    for key in amounts:
        named: dict[str, str] = json.loads(key)[3]
        level = {**leaf, **{tag: value for tag, value in named.items() if tag not in OWN_TAGS and value != "(none)"}}
        if level != leaf and level not in outer:
            outer.append(level)
    scope = Scope(leaf)
    scope.path = (*outer, leaf)
    return scope


def _corrected(first: Entry, further: Entry) -> Entry:
    """The entry with a correction's differences added."""
    return first._replace(
        outcome=further.outcome,
        estimated=further.estimated,
        cost_nanos=first.cost_nanos + further.cost_nanos,
        usage=_sum(first.usage, further.usage),
    )


def _sum(booked: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    """Counts added up; facts are the later ones."""
    result = dict(booked)
    for name, value in difference.items():
        if isinstance(value, Mapping):
            result[name] = _sum(result.get(name) or {}, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            result[name] = result.get(name, 0) + value
        else:
            result[name] = value
    return {name: value for name, value in result.items() if value or name == "requests"}
