"""The options of `Bursar` that a policy file, or a store's own books, hold for a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bursar.facade import Bursar


@dataclass(frozen=True, slots=True)
class Options:
    """`given`: arguments of `Bursar`. `reprices`: prices of one's own are among them. `is_told`: alerts go to somebody.

    `whole`: it is a policy file; the books alone hold budgets, and neither detectors nor required tags nor sinks.
    """

    given: dict[str, Any]
    reprices: bool
    is_told: bool
    whole: bool
    store: str


def options_of_file(path: Path) -> Options:
    """What a policy file says. Raises PolicyError."""
    from bursar.policy_file import read_policy  # pydantic loads with it

    policy = read_policy(path)
    reprices = bool(policy.price or policy.ceiling or policy.tools)
    return Options(policy.options(), reprices, any(not one.log for one in policy.alert), True, policy.store)


def options_of_books(books: Bursar, url: str) -> Options:
    """The budgets that are published in a store."""
    return Options({"budgets": list(books.guard.policy.budgets)}, False, False, False, url)
