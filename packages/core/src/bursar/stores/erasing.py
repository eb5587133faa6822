"""Erasure: a tag's value gives way to a marker in every row that names it, and no amount changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pydantic_core import from_json

from bursar.accounts import scope_budget
from bursar.signing import switch_name, worded
from bursar.stores import sqlite_rows as rows

PAGE = 1_000  # records that are looked at together
MAX_DEPTH = 20  # of JSON in JSON
KEY_PARTS = 5  # of an account's key: budget, unit, window, scope, start

# Sign anew what an operator had decided: kind, name, the definition, and the public key that had to sign it. None: no key for that.
Sign = Callable[[str, str, dict[str, Any], str], "dict[str, Any] | None"]


class Erased(NamedTuple):
    """How many rows named the value. `left`: decisions that a former operator has signed; they are as they were."""

    accounts: int = 0
    reservations: int = 0
    records: int = 0
    alerts: int = 0
    definitions: int = 0
    left: int = 0


@runtime_checkable
class Erasable(Protocol):
    """A store in which a tag's value can be erased."""

    def erase(self, erasure: Erasure, sign: Sign) -> Erased:
        """Put the marker into every row that names the value, in one transaction. Raises StoreError."""
        ...


class Erasure:
    """What is looked for, the value of a tag, and the marker that takes its place.

    It stands as a member of tags and scopes, within the keys of accounts, which are JSON texts, and as a run in the path of runs.
    `keys`: of the accounts that are renamed; what names another one, which calls make meanwhile, goes on naming it. `names`: of
    the budgets that scopes were opened with, which are made of their tags, and those that take their place.
    """

    def __init__(self, tag: str, value: str, marker: str) -> None:
        self.tag, self.value, self.marker = tag, value, marker
        self.keys: set[str] = set()
        self.names: dict[str, str] = {}
        plain = json.dumps(value, ensure_ascii=False)[1:-1]
        switch, listed = re.escape(f"{tag}={worded(value)}"), re.escape(f"{tag}={value}")
        # as the switch of it is named, and as an account is told in a sentence: "the budget 'day' (user=alice, desk=7) asks"
        self._named = re.compile(rf"(?<!\S){switch}(?!\S)|(?<=[( ]){listed}(?=, |\))")
        self.needles = tuple(
            {plain, json.dumps(plain, ensure_ascii=False)[1:-1]}
        )  # as it stands in JSON, and in JSON in JSON

    def of(self, value: Any, depth: int = 0) -> Any:
        """The same value with the marker in it."""
        if depth > MAX_DEPTH:
            return value
        if isinstance(value, Mapping):
            return {self.text(key): self._member(key, item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        return self.text(value, depth) if isinstance(value, str) else value

    def _member(self, key: str, item: Any, depth: int) -> Any:
        if key == self.tag and item == self.value:
            return self.marker
        if key == "path" and self.tag == "run" and isinstance(item, list):
            return [self.marker if one == self.value else one for one in item]
        return self.of(item, depth + 1)

    def text(self, text: str, depth: int = 0) -> str:
        """A text that is JSON, such as an account's key or a scope, or that names a switch or an account, with the marker in it."""
        if text in self.names:
            return self.names[text]
        if self.value not in text and not any(needle in text for needle in self.needles):
            return text
        try:
            before = json.loads(text)
        except ValueError:
            return self._named.sub(f"{self.tag}={self.marker}", text)
        if (
            isinstance(before, list)
            and len(before) == KEY_PARTS
            and isinstance(before[3], dict)
            and text not in self.keys
        ):
            return text
        after = self.of(before, depth + 1)
        return text if after == before else json.dumps(after, ensure_ascii=False)

    def json(self, text: str) -> str:
        """A column of JSON with the marker in it; one that does not name the value byte by byte as it was."""
        before = from_json(text)
        after = self.of(before)
        return text if after == before else rows.dumps(after)

    def name(self, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """The name of a definition: a switch is named after what it stops."""
        return switch_name(after) if name == switch_name(before) else self.said(name)

    def said(self, id: str) -> str:
        """An alert's id, which may hold an account's key, a switch's name or a run."""
        start = id.find("^[")
        if start >= 0 and (end := id.rfind("^")) > start:
            id = id[: start + 1] + self.text(id[start + 1 : end]) + id[end:]
        id = self.text(id)
        return id.replace(f" {self.value} ", f" {self.marker} ") if self.tag == "run" else id


class _Rows:
    """The rows of a store in a transaction that is open. `find`: whether a column holds a text, in the store's SQL."""

    def __init__(self, cursor: Any, mark: str, find: str, erasure: Erasure) -> None:
        self.cursor, self.mark, self.erasure = cursor, mark, erasure
        self._find = find

    def naming(self, table: str, columns: str, looked_at: tuple[str, ...], more: str = "", *values: Any) -> list[Any]:
        """The rows that may name the value."""
        wanted = " OR ".join(self._find.format(column) for column in looked_at for _ in self.erasure.needles)
        needles = [needle for _ in looked_at for needle in self.erasure.needles]
        self.cursor.execute(f"SELECT {columns} FROM {table} WHERE ({wanted}){more}", (*needles, *values))
        return list(self.cursor.fetchall())

    def put(self, table: str, key: str, before: tuple[Any, ...], after: Mapping[str, Any], keyed: Any) -> bool:
        """Write a row that has changed; whether it has."""
        if before == tuple(after.values()):
            return False
        told = ", ".join(f'"{name}" = {self.mark}' for name in after)
        self.cursor.execute(f"UPDATE {table} SET {told} WHERE {key} = {self.mark}", (*after.values(), keyed))
        return True

    def accounts(self, lock: str) -> int:
        if lock:  # whoever ends a reservation locks that before its accounts
            self.naming("reservations", "id", ("held",), f" ORDER BY id{lock}")
        found = self.naming("accounts", "key, budget, scope", ("key",), f" ORDER BY key{lock}")
        one, text = self.erasure, self.erasure.text
        one.keys = {row[0] for row in found}
        for _, name, scope in found:
            tags = json.loads(scope)
            if name == scope_budget(tags) and one.of(tags) != tags:
                one.names[name] = scope_budget(one.of(tags))
        for before, after in one.names.items():
            self.put("account_counts", "budget", (before,), {"budget": after}, before)
        return sum(
            self.put(
                "accounts", "key", row, {"key": text(row[0]), "budget": text(row[1]), "scope": text(row[2])}, row[0]
            )
            for row in found
        )

    def reservations(self) -> int:
        found = self.naming("reservations", "id, held, draft", ("held", "draft"))
        json = self.erasure.json
        return sum(
            self.put("reservations", "id", row[1:], {"held": json(row[1]), "draft": json(row[2])}, row[0])
            for row in found
        )

    def records(self) -> int:
        return sum(self._record(*row) for page in self._pages() for row in page)

    def _pages(self) -> Iterator[list[Any]]:
        last, looked_at = "", ("amounts", "draft", "facts")
        while True:
            more = f" AND id > {self.mark} ORDER BY id LIMIT {PAGE}"
            page = self.naming("records", "id, reason, amounts, draft, facts", looked_at, more, last)
            yield page
            if len(page) < PAGE:
                return
            last = page[-1][0]

    def _record(self, id: str, reason: str, amounts: str, draft: str, facts: str) -> bool:
        json, names = self.erasure.json, self.erasure.names
        after: dict[str, Any] = {"reason": names.get(reason, reason)}  # a refusal's is the budget's name
        after |= {"amounts": json(amounts), "draft": json(draft), "facts": json(facts)}
        before: tuple[Any, ...] = (reason, amounts, draft, facts)
        if self.erasure.tag in rows.TAGS and after["draft"] != draft:
            after[self.erasure.tag], before = from_json(after["draft"])["tags"].get(self.erasure.tag), (*before, None)
        return self.put("records", "id", before, after, id)

    def alerts(self) -> int:
        found = self.naming("alerts", "id, facts", ("id", "facts"))
        one = self.erasure
        return sum(
            self.put("alerts", "id", row, {"id": one.said(row[0]), "facts": one.json(row[1])}, row[0]) for row in found
        )

    def definitions(self, sign: Sign) -> tuple[int, int]:
        """Those that were rewritten, and those that somebody has signed whose key is not there."""
        self.cursor.execute("SELECT version, kind, name, definition FROM definitions ORDER BY version")
        public, changed, left = "", 0, 0
        for version, kind, name, text in list(self.cursor.fetchall()):
            before = from_json(text)
            if not isinstance(before, dict):
                continue
            signer = public
            if kind == "operator":
                public = str(before.get("public", ""))
            after = self.erasure.of(before)
            new_name = self.erasure.name(name, before, after)
            if (new_name, after) == (name, before):
                continue
            if "signature" in after:
                signed = sign(kind, new_name, {key: item for key, item in after.items() if key != "signature"}, signer)
                if signed is None:
                    left += 1
                    continue
                after = signed
            put = {"name": new_name, "definition": rows.dumps(after)}
            changed += self.put("definitions", "version", (name, text), put, version)
        return changed, left


def erase(cursor: Any, mark: str, find: str, erasure: Erasure, sign: Sign, *, lock: str = "") -> Erased:
    """Rewrite the rows, in the transaction that is open. `mark`: the driver's placeholder; `lock`: what locks rows that are read.

    Accounts come first: whoever holds or books on them waits, and then finds what it looks for under its new key.
    """
    found = _Rows(cursor, mark, find, erasure)
    accounts = found.accounts(lock)
    counts = accounts, found.reservations(), found.records(), found.alerts()
    return Erased(*counts, *found.definitions(sign))
