"""Decisions of operators that are in force: switches thrown, limits raised, questions answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bursar.commands import Definition, Definitions
from bursar.errors import InvalidInput
from bursar.signing import operator_of, verifies
from bursar.windows import window

log = logging.getLogger("bursar")
FOREVER_US = 2**62
# How long after an account's window its switch may still have to stop a call: as long as one that is extended can last.
_LINGERING_US = 2 * 86_400_000_000


class Freeze(NamedTuple):
    """Calls with these tags, or of this account, are stopped. `cause`: frozen, killed or a detector's name."""

    name: str
    tags: dict[str, str] | None
    account: str | None
    cause: str
    why: str
    by: str


class Approval(NamedTuple):
    """What became of a question: `state` open, approved or denied."""

    state: str
    why: str
    by: str


class Decisions:
    """What the store's definitions of kinds other than `budget` say. A raise or approval without a signature that holds is none."""

    def __init__(self, held: Definitions | None = None) -> None:
        held = held or {}
        self._public = operator_of(held)
        # However many runs were killed, a call is looked up in them, not compared with each.
        self._thrown = {name: one for name, one in _plain(held.get("freeze", {})) if one.get("frozen")}
        self.any_stopped = bool(self._thrown)  # whether any switch is
        self._by_account: dict[str, str] = {}
        self._by_tags: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
        for name, one in self._thrown.items():
            account = one.get("account")
            if account is not None:
                self._by_account[account] = name
                continue
            pairs = sorted((one.get("tags") or {}).items())
            values = self._by_tags.setdefault(tuple(tag for tag, _ in pairs), {})
            values[tuple(value for _, value in pairs)] = name
        self._approvals = dict(_plain(held.get("approval", {})))
        # Of thousands of old decisions a signature is looked at when somebody asks for its account, not with every change.
        self._unchecked: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
        for kind in ("raise", "approval"):
            for name, one in _plain(held.get(kind, {})):
                account = one.get("account")  # anything, where somebody wrote it past Bursar
                if isinstance(account, str) and (kind == "raise" or one.get("state") == "approved"):
                    self._unchecked.setdefault(account, []).append((kind, name, one))
        self._checked: dict[str, list[dict[str, Any]]] = {}

    def _granted(self, account: str) -> list[dict[str, Any]]:
        """What an operator has granted to this account, over or not."""
        found = self._checked.get(account)
        if found is None:
            found = [one for kind, name, one in self._unchecked.get(account, ()) if self._holds(kind, name, one)]
            self._checked[account] = found
        return found

    def _holds(self, kind: str, name: str, one: Mapping[str, Any]) -> bool:
        if self._public is not None and verifies(self._public, kind, name, one):
            return True
        log.error("the %s %r is not signed by this store's operator: it counts for nothing", kind, name)
        return False

    def granted(self, account: str, now_us: int) -> tuple[int, bool]:
        """By how much this account's limit is raised now, and whether it need not ask."""
        if account not in self._unchecked:  # as most are
            return 0, False
        found = [one for one in self._granted(account) if now_us < (one.get("until_us") or FOREVER_US)]
        return sum(one.get("raise_by", 0) for one in found), any(not one.get("raise_by") for one in found)

    def ends_us(self, account: str, now_us: int) -> int:
        """When the next of what was granted to this account ends."""
        if account not in self._unchecked:
            return FOREVER_US
        ends = (one.get("until_us") or FOREVER_US for one in self._granted(account))
        return min((end for end in ends if end > now_us), default=FOREVER_US)

    def approval(self, id: str, now_us: int) -> Approval:
        """How a question stands: open where nobody has answered it yet, or where the answer's time is over."""
        one = self._approvals.get(id, {})
        if one.get("state") == "approved" and not self._holds("approval", id, one):
            one = {}
        over = now_us >= (one.get("until_us") or FOREVER_US)
        return Approval("open" if over else one.get("state", "open"), one.get("why", ""), one.get("by", ""))

    def is_open(self, id: str) -> bool:
        """Whether this question has been asked, and not been answered."""
        return id in self._approvals and self._approvals[id].get("state") == "open"

    def is_stopped(self, account: str) -> bool:
        """Whether this account's switch is thrown."""
        return account in self._by_account

    def stop(self, levels: Iterable[Mapping[str, str]], accounts: Iterable[str]) -> Freeze | None:
        """The switch that stops a call with these tags, level by level, on these accounts; None when there is none."""
        for account in accounts:
            if account in self._by_account:
                return self._freeze(self._by_account[account])
        for tags in levels:
            for names, switches in self._by_tags.items():
                name = switches.get(tuple(tags.get(tag, "") for tag in names))
                if name is not None:
                    return self._freeze(name)
        return None

    def _freeze(self, name: str) -> Freeze:
        one = self._thrown[name]
        cause, why, by = one.get("cause", "frozen"), one.get("why", ""), one.get("by", "")
        return Freeze(name, one.get("tags"), one.get("account"), cause, why, by)


def renewed(held: Definitions, newer: Definitions, now_us: int) -> Definitions:
    """What is held, with what is newer in its place; without the switches that can stop nothing any more."""
    kinds = {kind: {**held.get(kind, {}), **newer.get(kind, {})} for kind in [*held, *newer]}
    if "freeze" in kinds:
        kinds["freeze"] = {name: one for name, one in kinds["freeze"].items() if may_stop(one.definition, now_us)}
    return kinds


def may_stop(switch: Mapping[str, Any], now_us: int) -> bool:
    """Whether a switch is thrown, and not on an account whose window is over for so long that no call of it is under way."""
    account = switch.get("account")
    return bool(switch.get("frozen")) and (account is None or now_us < end_us(account) + _LINGERING_US)


def end_us(account: Any) -> int:
    """When the account's window ends. Its key says so, which is bound to the switch's name: nobody can have it end sooner."""
    try:
        _, _, name, _, start_us = json.loads(account)
        kind, _, zone = name.rpartition(" ")
        return (window(kind, zone).bounds(start_us)[1] if start_us else None) or FOREVER_US
    except (InvalidInput, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return FOREVER_US  # a rate has no window; and whatever else it is, the switch stays


def _plain(held: Mapping[str, Definition]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one.definition) for name, one in held.items()]


NO_DECISIONS = Decisions()
