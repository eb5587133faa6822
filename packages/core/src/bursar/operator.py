"""The operator: throws switches, answers what thresholds ask, raises limits, and takes expired reservations off the books."""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from bursar.accounts import Account
from bursar.budget import Budget, parse_limit
from bursar.commands import Definition, Ended, Release, Tell
from bursar.decisions import end_us, may_stop
from bursar.errors import InvalidInput, OperatorRequired, shown
from bursar.records import UsageRecord, amount
from bursar.refusal import rejection
from bursar.retention import Bound, bound, prunable_store
from bursar.scope import check_tags
from bursar.signing import OperatorKey, content, prune_name, short_id, switch_name
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.stores.erasing import Erasable, Erased, Erasure
from bursar.stores.pruning import Pruned
from bursar.texts import printable

MAX_FOR_S = 100 * 366 * 86_400.0

log = logging.getLogger("bursar")


@dataclass(frozen=True, slots=True)
class Question:
    """What a threshold asks, or was answered: `state` is open, approved or denied; over, where its window ended without an answer.

    Amounts are Decimal in the unit.
    """

    id: str
    state: str
    budget: str
    scope: dict[str, str]
    unit: str
    limit: Decimal
    spent: Decimal
    owner: str | None
    tags: dict[str, str]
    by: str
    why: str


class Operator:
    """Decisions over a store that agents use, from outside of their processes.

    `key`: an OperatorKey or its text, needed to approve, raise, resume and release; the store refuses these without a signature
    that holds. `by`: who decides, on record (default: the user of this machine). Raises InvalidInput or StoreError.
    """

    def __init__(self, store: str | Store, key: OperatorKey | str | None = None, *, by: str | None = None) -> None:
        self.store: Store = open_store(store, with_leases=False) if isinstance(store, str) else store
        self._key = OperatorKey(key) if isinstance(key, str) else key
        self._by = printable(by or getpass.getuser(), 200)

    def appoint(self) -> OperatorKey:
        """Make a new key and have the store know its public half. Where it knows one already, that one has to sign."""
        new = OperatorKey.generate()
        self._publish(
            "operator", "operator", {"public": new.public}, signed=self._held("operator", "operator") is not None
        )
        return new

    def freeze(self, tags: Mapping[str, str], *, why: str = "") -> str:
        """Stop everything with these tags (none: everything), streams in flight included; the name to resume it by."""
        tags = check_tags(tags)
        name = switch_name({"tags": tags})
        self._publish("freeze", name, {"frozen": True, "tags": dict(tags), "cause": "frozen", "why": why}, signed=False)
        self._tell("frozen", name, {"name": name, "tags": dict(tags), "why": why, "by": self._by})
        return name

    def frozen(self) -> dict[str, dict[str, Any]]:
        """The switches that are thrown and may still stop anything, by name, with who threw them, why and when."""
        _, held = self.store.definitions()
        now_us = self.store.now_us()
        return {
            name: one.definition for name, one in held.get("freeze", {}).items() if may_stop(one.definition, now_us)
        }

    def resume(self, name: str, *, why: str = "") -> None:
        """Put a switch back, by its name. Needs the key."""
        held = self._held("freeze", name)
        if held is None or not held.definition.get("frozen"):
            known = ", ".join(self.frozen()) or "nothing"
            raise InvalidInput(f"{name!r} is not stopped; stopped are: {known}. Give one of these.", argument="name")
        self._publish("freeze", name, {**held.definition, "frozen": False, "why": why}, signed=True)
        self._tell("resolved", f"resume {name}", {"name": name, "why": why, "by": self._by, "was": "frozen"})

    def questions(self) -> list[Question]:
        """What thresholds have asked, and how it was answered. What somebody else put there is left out, and logged."""
        _, held = self.store.definitions()
        found, now_us = [], self.store.now_us()
        for id, one in held.get("approval", {}).items():
            try:
                found.append(_question(id, one.definition, now_us))
            # raised, it would hide all others
            except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
                log.warning("the question %r cannot be read: no threshold has put it", id)
        return found

    def approve(self, id: str, *, raise_by: str | None = None, for_s: float | None = None, why: str = "") -> None:
        """Let what asked go on: with its limit raised by an amount ("5 USD"), else up to the limit; for a time, else for good."""
        held = self._question(id)
        if self.store.now_us() >= end_us(held.definition.get("account")):
            raise InvalidInput(
                f"The window that {id!r} asks about is over, and holds up nothing any more. `bursar approvals` lists what does.",
                argument="id",
            )
        answer = {
            **held.definition,
            "state": "approved",
            "raise_by": 0 if raise_by is None else _amount_in(held.definition["account"], raise_by),
            "until_us": self._until_us(for_s),
            "why": why,
        }
        self._publish("approval", id, answer, signed=True)
        self._answered("approve", id, held)

    def deny(self, id: str, *, why: str = "") -> None:
        """Refuse what asked, for as long as its limit stays as it is. Needs no key: it only stops."""
        held = self._question(id)
        self._publish("approval", id, {**held.definition, "state": "denied", "why": why}, signed=False)
        self._answered("deny", id, held)

    def raise_limit(
        self, budget: str, by: str, scope: Mapping[str, str] | None = None, *, for_s: float | None = None, why: str = ""
    ) -> Account:
        """Raise the limit of one account by an amount ("5 USD"), for a time, else while its window lasts. Needs the key."""
        now_us = self.store.now_us()
        wanted = dict(scope or {})
        found = [
            account
            for account in self.store.accounts()
            if account.rule.budget == budget
            and json.loads(account.rule.scope) == wanted
            and account.rule.kind in ("window", "rolling", "slots")
            and (account.rule.end_us is None or now_us < account.rule.end_us)
        ]
        if len(found) != 1:
            raise InvalidInput(
                f"{len(found)} accounts of the budget {budget!r} have the scope {wanted}. "
                "Name one that `bursar status` shows, with all its tags.",
                argument="scope",
            )
        account = found[0].rule.key
        grant = {
            "account": account,
            "raise_by": _amount_in(account, by),
            "until_us": self._until_us(for_s),
            "why": why,
        }
        self._publish("raise", short_id("raise", account, by, now_us), grant, signed=True)
        return found[0]

    def release(self, id: str, *, why: str = "released by an operator") -> UsageRecord:
        """Take an expired reservation off the books, when it is known that the provider did not bill it. Needs the key."""
        self._require_key("release", id)
        assert self._key is not None
        _, held = self.store.definitions()
        if "operator" not in held:
            raise OperatorRequired(
                "This store has no operator yet. Run `bursar operator init` first, and keep its key away from the agents.",
                kind="release",
                name=id,
            )
        proof = self._key.prove(id)
        # the record keeps the proof, so that an audit can tell it from one that was written past the store
        answer = self.store.execute(Release(id, "cancelled", printable(why), {"by": self._by, "proof": proof}, proof))
        if type(answer) is not Ended:
            raise rejection(id, answer)  # type: ignore[arg-type]
        return UsageRecord.of(answer.entry)

    def prune(self, before_us: int, *, why: str = "") -> tuple[Pruned, Bound]:
        """Put sums in the place of records settled before that time, as far as `bursar.retention` lets them go, and retire the
        accounts of windows that ended and of runs that nothing was booked on since; what went, and the bound.

        Needs the key once the store knows an operator. What was cut off is finished by doing it again.
        """
        store = prunable_store(self.store)
        until = bound(self.store, before_us)
        name = prune_name(until.before_us)
        known = self._held("operator", "operator") is not None
        if self._held("prune", name) is None:
            self._publish("prune", name, {"before_us": until.before_us, "why": why}, signed=known)
        return store.prune(until.before_us, {"by": self._by}), until

    def erase(self, tag: str, value: str, *, marker: str, why: str = "") -> Erased:
        """Put `marker` in the place of a tag's value, wherever the store names it; no amount changes. `marker` has to be new.

        Needs the key once the store knows an operator; decisions that named the value are signed anew. Raises InvalidInput.
        """
        if not isinstance(self.store, Erasable):
            raise InvalidInput(
                "Only stores on SQLite and PostgreSQL can erase a tag's value. Drain the records of Redis into such a store, "
                "erase there, and let the budgets in Redis run out.",
                argument="store",
            )
        for one in (value, marker):
            check_tags({tag: one})
        known = self._held("operator", "operator") is not None
        self._publish("erase", marker, {"tag": tag, "why": why}, signed=known)
        key = self._key

        def sign(kind: str, name: str, definition: dict[str, Any], public: str) -> dict[str, Any] | None:
            return key.sign(kind, name, definition) if key is not None and key.public == public else None

        return self.store.erase(Erasure(tag, value, marker), sign)

    def publish_budgets(self, budgets: Iterable[Budget]) -> list[str]:
        """Put budgets in force, changed ones included, all or none; the names of those that the store had otherwise, or not.

        Changed ones need the key once the store knows an operator.
        """
        held = self.store.definitions()[1].get("budget", {})
        found = {}
        for budget in budgets:
            before, definition = held.get(budget.name), budget.definition()
            if before is None or content(before.definition) != definition:
                signed = before is not None and self._key is not None
                found[budget.name] = self._said("budget", budget.name, definition, before, signed=signed)
        self.store.publish(found)
        return list(found)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _publish(self, kind: str, name: str, definition: Mapping[str, Any], *, signed: bool) -> None:
        said = self._said(kind, name, definition, self._held(kind, name), signed=signed)
        self.store.publish({name: said}, kind)

    def _said(
        self, kind: str, name: str, definition: Mapping[str, Any], before: Definition | None, *, signed: bool
    ) -> dict[str, Any]:
        """The definition with who says so and when, and the signature; `before` is what it takes the place of."""
        said = {**content(definition), "by": self._by, "at_us": self.store.now_us()}
        if "why" in said:
            said["why"] = printable(said["why"])
        if not signed:
            return said
        self._require_key(kind, name)
        assert self._key is not None
        if before is not None:
            said["of"] = before.version
        return self._key.sign(kind, name, said)

    def _require_key(self, kind: str, name: str) -> None:
        if self._key is None:
            raise OperatorRequired(
                f"The {kind} {name!r} needs the operator's key. Give it with --key FILE or BURSAR_OPERATOR_KEY, "
                "where no agent can read it.",
                kind=kind,
                name=name,
            )

    def _held(self, kind: str, name: str) -> Definition | None:
        _, held = self.store.definitions()
        return held.get(kind, {}).get(name)

    def _question(self, id: str) -> Definition:
        held = self._held("approval", id)
        if held is None:
            raise InvalidInput(f"Nothing asks under {id!r}. `bursar approvals` lists what does.", argument="id")
        return held

    def _until_us(self, for_s: float | None) -> int | None:
        if for_s is not None and not 0 < for_s <= MAX_FOR_S:
            raise InvalidInput(
                f"for_s cannot be {shown(for_s)}. Give seconds, up to a hundred years.", argument="for_s"
            )
        return None if for_s is None else self.store.now_us() + int(for_s * 1e6)

    def _answered(self, verb: str, id: str, held: Definition) -> None:
        budget = held.definition["budget"]
        self._tell("resolved", f"{verb} {id}", {"id": id, "budget": budget, "by": self._by, "was": "approval"})

    def _tell(self, kind: str, name: str, facts: dict[str, Any]) -> None:
        self.store.execute(Tell(f"{name} {self.store.now_us()}", kind, facts))


def _question(id: str, one: Mapping[str, Any], now_us: int) -> Question:
    budget, unit, _, scope, _ = json.loads(one["account"])
    if not isinstance(scope, dict) or not isinstance(one["tags"], dict):
        raise TypeError("a scope and tags have names")
    is_over = one["state"] == "open" and now_us >= end_us(one["account"])
    return Question(
        id,
        "over" if is_over else one["state"],
        budget,
        scope,
        unit,
        amount(one.get("limit", 0), unit),
        amount(one.get("spent", 0), unit),
        one.get("owner"),
        one["tags"],
        one.get("by", ""),
        one["why"],
    )


def _amount_in(account: str, text: str) -> int:
    """An amount such as "5 USD" in the account's own unit. Raises InvalidInput, PolicyError."""
    _, unit, _, _, _ = json.loads(account)
    limit = parse_limit(Budget("raise", text))
    if limit.unit != unit or limit.period_us or unit not in text:  # another currency, whose rate nobody knows here
        raise InvalidInput(f'{text!r} cannot be added to {unit}. Write it like "5 {unit}".', argument="raise_by")
    return limit.amount
