"""What thresholds make of one call of a loop that is reckoned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from bursar.accounts import Rule
from bursar.budget import Budget
from bursar.foresight.balance import Balance
from bursar.ladder import throttled
from bursar.policy import Matched


class Line(NamedTuple):
    """One account of a call: what is asked of it, and what will be spent from it."""

    budget: Budget
    rule: Rule
    held: int
    actual: int


class Taken:
    """What thresholds have made of one call: its model, its maximum output, its rates; and up to which mark of each account."""

    def __init__(self, model: str, output_tokens: int) -> None:
        self.model = model
        self.output_tokens = output_tokens
        self.throttles: tuple[Matched, ...] = ()
        self.complied: dict[str, int] = {}

    def comply(self, lines: Sequence[Line], balances: Mapping[str, Balance], is_tool: bool) -> bool:
        """Do what the reached marks of the accounts ask for; whether anything was left to do."""
        reached = [(line, balances[line.rule.key].marks()) for line in lines]
        due = [(line, count) for line, count in reached if count > self.complied.get(line.rule.key, 0)]
        for line, count in due:
            for threshold in line.budget.ladder[self.complied.get(line.rule.key, 0) : count]:
                if threshold.action == "downgrade" and not is_tool:
                    models = (threshold.models or {}).items()
                    self.model = next((to for name, to in models if fnmatchcase(self.model, name)), self.model)
                elif threshold.action == "clamp" and not is_tool:
                    self.output_tokens = min(self.output_tokens, threshold.max_output_tokens or self.output_tokens)
                elif threshold.action == "throttle" and threshold.rate is not None:
                    units = ("USD", "calls") if is_tool else ("USD", "tokens", "requests")
                    self.throttles = throttled(self.throttles, line.rule, threshold.rate, units)
            self.complied[line.rule.key] = count
        return bool(due)
