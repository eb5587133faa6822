"""Hot reload: a policy file that changes takes effect in the running program, whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bursar.commands import Tell
from bursar.errors import BursarError, InvalidInput, PolicyError, StoreError
from bursar.files import open_to_all
from bursar.policy_file.changes import compare
from bursar.policy_file.file import PolicyFile
from bursar.policy_file.read import read_policy
from bursar.settings import Settings
from bursar.signing import short_id
from bursar.stores.base import Store

log = logging.getLogger("bursar")

Stamp = tuple[int, int, int] | None  # a file's time, size and inode; None where there is none
_SETTINGS = ("budgets", "prices", "rates", "detectors", "require", "default_limit", "alerts")


class PolicyWatch:
    """The policy file of one Bursar: `policy` is what it said last, `options` what Bursar is made of.

    `own`: options that the program gives itself; they win over the file's. Raises PolicyError, InvalidInput.
    """

    def __init__(self, path: str | Path, own: Mapping[str, Any]) -> None:
        if own.get("budgets") is not None:
            raise InvalidInput("The budgets stand in the policy file. Leave `budgets` out.", argument="budgets")
        self._path = Path(path).absolute()
        self._own = own
        self._seen = self._taken = _stamp(self._path)
        self._refused: tuple[Stamp, int] | None = None  # the file, and the store's version, that cannot be taken
        self._fault = ""  # the id of the alert that told of it
        self.policy = read_policy(path)
        if "change" in open_to_all(path):
            log.warning("every user of this machine may change the policy %s. Take that from them: chmod o-w.", path)
        self.options = self._options(self.policy)

    def look(self, store: Store, take: Callable[[Settings], None]) -> None:
        """Take the file if it has changed. What is wrong with it is logged and told, once. Raises StoreError: try again."""
        stamp = _stamp(self._path)
        if stamp != self._seen:  # somebody may still be writing: half a file can be valid, and lack budgets
            self._seen = stamp
        elif stamp == self._taken:
            self._tell_over(store)  # what could not be taken is gone, and this is back
            self._refused = None
        elif self._refused != (refused := (stamp, store.version())):
            try:
                self._try(take)
            except StoreError:
                raise
            except BursarError as error:
                self._tell(store, stamp, error)
                if not isinstance(error.__cause__, OSError):  # what cannot be read now may be readable as it stands
                    self._refused = refused
            else:
                self._tell_over(store)
                self._taken, self._refused = stamp, None

    def _try(self, take: Callable[[Settings], None]) -> None:
        policy = read_policy(self._path)
        for key, variable in (("store", "BURSAR_STORE"), ("operator", "BURSAR_OPERATOR")):
            if getattr(policy, key) != getattr(self.policy, key) and variable not in os.environ:
                raise PolicyError(f"The {key} cannot change while the program runs. Restart it.", key=key)
        options = self._options(policy)
        take(Settings.of(**{name: value for name, value in options.items() if name in _SETTINGS}))
        changes = compare(self.policy, policy)
        self.policy, self.options = policy, options
        said = "; ".join(f"{change.budget} {change.what}".lstrip() for change in changes)
        log.info("%s is in force as it reads now: %s", self._path, said or "nothing has changed")

    def _options(self, policy: PolicyFile) -> dict[str, Any]:
        """The file's settings under the program's own; the same alerts as before where the file says the same of them."""
        options = policy.options()
        if "alerts" not in self._own:
            same = hasattr(self, "options") and policy.alert == self.policy.alert
            options["alerts"] = self.options["alerts"] if same else policy.make_alerts()
        return {**options, "operator": policy.operator, **self._own}

    def _tell(self, store: Store, stamp: Stamp, error: BursarError) -> None:
        fault = short_id(
            "policy", str(self._path), stamp, str(error)
        )  # every process of this machine gives it the same id
        if fault == self._fault:
            return
        log.error("%s cannot be taken, and what was in force stays in force. %s", self._path, error)
        facts = {"file": str(self._path), "why": str(error), "line": error.fields.get("line")}
        store.execute(Tell(fault, "policy", facts))
        self._fault = fault  # told, and not before

    def _tell_over(self, store: Store) -> None:
        if self._fault:
            facts = {"file": str(self._path), "was": "policy"}
            store.execute(Tell(short_id("resolved", self._fault), "resolved", facts))
            self._fault = ""


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
