"""Slots: what the names of keys begin with, so that Redis Cluster keeps an organisation's keys together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from bursar.accounts import Rule
from bursar.commands import Charge, Command, Draw, Reserve, Tell
from bursar.errors import PolicyError
from bursar.stores.redis.scripts import SHARE
from bursar.stores.redis.server import Server

NONE = "(none)"  # of calls without an organisation, as in the keys of their accounts
MAX_KNOWN = 100_000  # ids whose slot is remembered
_MAX_NAME = 200


def prefix(org: str) -> str:
    """What the keys of an organisation begin with. Its braces and other signs are encoded, a long name is hashed."""
    name = quote(org, safe="")
    if not 0 < len(name) <= _MAX_NAME:
        name = f"%%{hashlib.blake2b(org.encode(), digest_size=20).hexdigest()}"  # no encoded name has two of these
    return f"bursar{{{name}}}:"


def check_budgets(definitions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise PolicyError for a budget whose accounts would lie in several slots."""
    for name, definition in definitions.items():
        if "org" not in definition.get("per", ()) and definition.get("mode") != "off":
            raise _across(f"The budget {name!r}")


def _across(what: str) -> PolicyError:
    return PolicyError(
        f"{what} is not kept by organisation, and a Redis cluster holds each organisation in a slot of its own. "
        'Write per=["org", ...], or name one organisation in the store\'s URL (?org=acme), or use PostgreSQL.',
        key="per",
    )


@lru_cache(maxsize=4_096)
def _org(scope: str) -> str | None:
    org: str | None = json.loads(scope).get("org")
    return org


def _check_rules(org: str, rules: Iterable[Rule]) -> None:
    for rule in rules:
        if _org(rule.scope) != org:
            raise _across(f"The account {rule.key} of a call for {org!r}")


class Slots:
    """In which slot a command works: the one that the store was opened with, or that of the organisation in its tags.

    The policy is published in one slot, and each organisation's has a copy of its version. Whoever works in a slot for the first
    time adds it to the list of slots, then reads the version, then raises the copy; whoever publishes writes the version, then
    reads the list, then raises the copies. So a slot that a publisher does not see on the list was added after the version had
    been written, and whoever added it has read that version. What all copies have is written down as `shared:`, and where a
    publisher died half-way, the next process that looks at the version goes on for it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.by_org = server.is_cluster and server.org is None
        self.policy = prefix(server.org or "bursar")
        self._joined: set[str] = set()
        self._homes: dict[str, str] = {}

    def all(self) -> list[str]:
        """Every slot that was ever worked in, by name."""
        if not self.by_org:
            return [self.policy]
        return sorted(name.decode() for name in self._server.ask("SMEMBERS", f"{self.policy}slots"))

    def of(self, command: Command) -> str:
        """The command's slot. Raises PolicyError for accounts beyond it."""
        if not self.by_org:
            return self.policy
        if type(command) is Tell:
            org = (command.facts.get("tags") or {}).get("org", NONE)
        elif type(command) is Reserve or type(command) is Charge:
            org = command.draft["tags"].get("org", NONE)
            _check_rules(org, [rule for rule, _ in command.lines])
            self.remember(f"i:{command.id}", prefix(org))
        elif type(command) is Draw and command.rules:
            org = _org(command.rules[0].scope) or NONE
            _check_rules(org, command.rules)
        else:
            return self.home(f"i:{command.id}")
        slot = prefix(org)
        if slot not in self._joined:
            self.join(slot)
        return slot

    def of_account(self, key: str) -> str:
        """The slot of the account with this key."""
        return prefix(json.loads(key)[3].get("org", NONE)) if self.by_org else self.policy

    def join(self, slot: str) -> None:
        """Make a slot known to those who publish, and what they have published known to it."""
        self._server.ask("SADD", f"{self.policy}slots", slot)
        version, operator = self._published()
        self._server.run(SHARE, slot, version, operator)
        self._joined.add(slot)

    def _published(self) -> tuple[str, str]:
        """The policy's version, and the operator's key or ''."""
        version, operator = self._server.ask("HMGET", f"{self.policy}policy", "version", "operator")
        return (version or b"0").decode(), (operator or b"").decode()

    def share(self) -> None:
        """Raise the copies of every slot to what is published."""
        version, operator = self._published()
        for slot in self.all():
            self._server.run(SHARE, slot, version, operator)
        self._server.run(SHARE, f"{self.policy}shared:", version, "")

    def version(self) -> int:
        """The version that is published, after it has been shared."""
        version = int(self._server.ask("HGET", f"{self.policy}policy", "version") or 0)
        if self.by_org and version != int(self._server.ask("HGET", f"{self.policy}shared:policy", "version") or 0):
            self.share()
        return version

    def remember(self, row: str, slot: str) -> None:
        """Where a row stands, so that nobody has to look for it."""
        if not self.by_org:
            return
        if len(self._homes) >= MAX_KNOWN:
            self._homes.clear()
        self._homes[row] = slot

    def home(self, row: str) -> str:
        """The slot of a row (`i:ID`, `t:ID`), looked for in every slot where another process has made it."""
        if not self.by_org:
            return self.policy
        known = self._homes.get(row)
        if known is not None:
            return known
        slots = self.all()
        there = self._server.many(("EXISTS", f"{slot}{row}") for slot in slots)
        found = next((slot for slot, exists in zip(slots, there, strict=True) if exists), None)
        if found is None:
            return prefix(NONE)  # nowhere, and so not there either
        self.remember(row, found)
        return found
