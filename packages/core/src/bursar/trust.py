"""Trust: what a process believes of the decisions in its store, which agents may be able to write to as well."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from bursar.commands import Definition, Definitions
from bursar.errors import OperatorRequired, StoreError
from bursar.signing import check_public, content, operator_of, verifies
from bursar.stores.base import Store

log = logging.getLogger("bursar")

ENVIRONMENT = "BURSAR_OPERATOR"


class Trust:
    """The operator that is pinned, if any, and the budgets that this process has taken.

    A pin is the public half of the operator's key, from where no agent can change it. With it the process appoints that
    operator in a store that has none, and refuses a store that has another: nobody comes before the operator, or in the place
    of it. Raises InvalidInput for what is no public key.
    """

    def __init__(self, pin: str | None) -> None:
        self.pin = None if pin is None else check_public(pin)
        self._taken: dict[str, Definition] = {}
        self._told: set[tuple[str, int]] = set()

    def appoint(self, store: Store) -> None:
        """See that the store knows the pinned operator, and no other. Raises OperatorRequired, StoreError."""
        if self.pin is None:
            return
        held = store.definitions()[1]
        if operator_of(held) is None:
            one = {"public": self.pin, "by": ENVIRONMENT, "at_us": store.now_us()}
            store.publish({"operator": one}, "operator")
            held = store.definitions()[1]
        self.check(held)

    def check(self, held: Definitions) -> None:
        """Raise OperatorRequired where another operator stands in the store than the pinned one."""
        public = operator_of(held)
        if self.pin is not None and public != self.pin:
            raise OperatorRequired(
                f"The operator of this store is {public or 'nobody'}, and this process trusts {self.pin}: somebody has "
                f"written to the store. Find out who, and put the operator back; or correct {ENVIRONMENT}.",
                kind="operator",
                name="operator",
            )

    def budgets(self, held: Definitions, names: Iterable[str] | None) -> list[dict[str, Any]]:
        """The budgets of these names (None: all) that hold: what was changed without the operator's signature does not.

        Raises StoreError for one that is gone.
        """
        newest = held.get("budget", {})
        return [
            self._budget(name, newest.get(name), operator_of(held)) for name in (newest if names is None else names)
        ]

    def _budget(self, name: str, found: Definition | None, public: str | None) -> dict[str, Any]:
        taken = self._taken.get(name)
        if found is None and taken is None:
            raise StoreError(f"The store has lost the budget {name!r}. Restore it from a backup.", fault="damaged")
        if taken is not None and (found is None or not _follows(name, found, taken, public)):
            version = 0 if found is None else found.version
            if (name, version) not in self._told:
                self._told.add((name, version))
                log.error("the budget %r was changed, and no operator has signed it: it stays as it was", name)
            return content(taken.definition)
        assert found is not None
        self._taken[name] = found
        return content(found.definition)


def _follows(name: str, found: Definition, taken: Definition, public: str | None) -> bool:
    """Whether a definition may take the place of one that was taken before."""
    if public is None or content(found.definition) == content(taken.definition):
        return True
    of = found.definition.get("of")  # what it was signed to take the place of: an old signature does not serve again
    return isinstance(of, int) and of >= taken.version and verifies(public, "budget", name, found.definition)
