"""Recorded amounts: what past calls held and cost, at other prices where the model, the answer or the prices are others."""

from __future__ import annotations

from collections.abc import Mapping

from bursar.amounts import Amounts, Lines, amounts_of
from bursar.call import Call
from bursar.estimate import Estimate
from bursar.foresight.past import Past
from bursar.foresight.simulation import Simulation
from bursar.policy import Matched
from bursar.usage import Usage

_OUTPUT_COUNTS = ("output_tokens", "reasoning_tokens", "output_audio_tokens", "output_image_tokens")


class RecordedAmounts(Amounts):
    """The amounts of past calls: what was held for them, at other prices where the model, the answer or the prices are others."""

    def __init__(self, simulation: Simulation, reprice: bool) -> None:
        super().__init__(simulation.guard.learner)
        self.book = simulation.guard.book
        self.pasts: dict[str, Past] = {}
        self._reprice = reprice

    def lines(self, call: Call, matched: tuple[Matched, ...]) -> Lines:
        if call.request is None:
            return super().lines(call, matched)
        past = self.pasts[call.id]
        nanos = self.cost(call, past.held_nanos, past.held_usage)
        usage = cut(past.held_usage, call)
        output = usage.output_tokens
        call.estimate = Estimate(usage.input_tokens, output, output, 1, True, "as it was")
        self.write_draft(call, nanos, {})
        learned, strict = (amounts_of(call.estimate, nanos, requests=count) for count in (1, call.attempts))
        return tuple(
            (one.rule, (strict if one.budget.estimate == "strict" else learned)[one.rule.unit]) for one in matched
        )

    def cost(self, call: Call, nanos: int, usage: Usage) -> int:
        """What cost `nanos` for `usage` then, as this call makes it now. Rounded up. Raises UnknownPrice."""
        past = self.pasts[call.id]
        less = cut(usage, call)
        same = less is usage and (call.provider, call.model) == (past.tags.get("provider"), past.model)
        if same and not self._reprice:
            return nanos
        now = self._price(call.tags(), less if same else _by_counts_alone(less), past.reserved_us)
        before = 0 if self._reprice else self._price(past.tags, usage, past.reserved_us)
        return -(-nanos * now // before) if before else now

    def _price(self, tags: Mapping[str, str], usage: Usage, at_us: int) -> int:
        return self.book.cost(tags["provider"], tags["model"], usage, at_us=at_us, tags=tags).cost_nanos


def _by_counts_alone(usage: Usage) -> Usage:
    """The usage without what said which model answered, and what the provider billed for it."""
    return usage.replace(model=None, stated_cost_nanos=None, other_models=())


def cut(usage: Usage, call: Call) -> Usage:
    """The usage with an answer that is no longer than a threshold lets it be."""
    most = None if call.request is None or not call.capped else call.request.max_output_tokens
    if most is None or usage.output_tokens <= most:
        return usage
    return usage.replace(**{name: min(getattr(usage, name), most) for name in _OUTPUT_COUNTS})
