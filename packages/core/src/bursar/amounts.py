"""Amounts: what a call may cost on each account that it matches, and how large an answer would fit."""

from __future__ import annotations

from bursar.accounts import Rule
from bursar.call import Call
from bursar.commands import Refused
from bursar.errors import UnboundedEstimate
from bursar.estimate import Estimate, Learner, strict
from bursar.policy import Matched
from bursar.usage import Usage

MIN_OUTPUT_TOKENS = 16  # a smaller answer than this is refused rather than cut

Lines = tuple[tuple[Rule, int], ...]


class Amounts:
    """Estimate times price, in every unit. It learns from the calls that were settled."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def lines(self, call: Call, matched: tuple[Matched, ...]) -> Lines:
        """The amount that the call may cost, for every account it matches."""
        if call.request is None:
            self.write_draft(call, call.amounts["USD"], {})
            return tuple(
                (one.rule, call.amounts.get(one.rule.unit, int(one.rule.unit != "failures"))) for one in matched
            )
        learned = self._learned(call)
        bound: dict[str, int] = {}
        lines = []
        for one in matched:
            if one.budget.estimate == "strict":
                bound = bound or self._bound(call)
            amounts = bound if one.budget.estimate == "strict" else learned
            lines.append((one.rule, amounts[one.rule.unit]))
        assert call.estimate is not None
        usage = {}
        if call.estimate.input_tokens:
            usage["input_tokens"] = call.estimate.input_tokens
        if call.estimate.output_tokens:
            usage["output_tokens"] = call.estimate.output_tokens
        self.write_draft(call, (bound or learned)["USD"], usage)  # of what the estimate is for
        return tuple(lines)

    def _learned(self, call: Call) -> dict[str, int]:
        assert call.request is not None
        assert call.price is not None
        if call.usage is not None:
            return _said(call, call.usage, call.price.cost_nanos(call.usage))
        estimate = call.estimate = self._learner.estimate(
            call.request,
            run=call.run,
            context_window=call.price.context_window,
            max_output_tokens=call.price.max_output_tokens,
        )
        cost_nanos = call.price.tokens_nanos(
            estimate.input_tokens, estimate.output_tokens, call.service_tier, call.region
        )
        return amounts_of(estimate, cost_nanos, requests=1)

    def _bound(self, call: Call) -> dict[str, int]:
        """The upper bound, per attempt and round of the provider's own tools, because context tiers count per request."""
        assert call.request is not None
        assert call.price is not None
        if call.usage is not None:
            return _said(call, call.usage, call.price.cost_nanos(call.usage), call.attempts, is_bound=True)
        estimate = call.estimate = strict(
            call.request,
            context_window=call.price.context_window,
            max_output_tokens=call.price.max_output_tokens,
        )
        rounds = max(1, estimate.answers // max(1, call.request.n))
        cost_nanos = rounds * call.price.bound_nanos(
            -(-estimate.input_tokens // rounds),
            -(-estimate.output_tokens // rounds),
            media=bool(call.request.media),
            service_tier=call.service_tier,
            region=call.region,
        )
        return amounts_of(estimate, cost_nanos + self._fees_bound(call), requests=call.attempts)

    def _fees_bound(self, call: Call) -> int:
        """What the provider's own tools may cost beside their tokens."""
        assert call.request is not None
        assert call.price is not None
        additions = call.request.additions
        fee_nanos = call.price.dearest_tool_nanos(additions.server)
        if not fee_nanos:
            return 0
        if additions.uses is None:
            raise UnboundedEstimate(
                f"A strict budget cannot bound this call of {call.model}: {', '.join(additions.server[:3])} may be used any "
                "number of times, each at a fee. Set max_uses or max_tool_calls, or use the learned estimate for this budget.",
                reason="nothing limits how often the provider's tools are used",
                provider=call.provider,
                model=call.model,
            )
        return fee_nanos * additions.uses * call.attempts

    def write_draft(self, call: Call, cost_nanos: int, usage: dict[str, int]) -> None:
        """What the call's record will tell, whatever becomes of this process."""
        call.draft = {
            "path": list(call.scope.runs),
            "tags": call.tags(),
            "cost_nanos": cost_nanos,
            "usage": usage,
            "price_version": call.book.version,
        }
        if call.attempts > 1:
            call.draft["attempts"] = call.attempts
        if call.model_asked:
            call.draft["model_asked"] = call.model_asked
        if call.actions:
            call.draft["actions"] = list(call.actions)
        if call.given_id and call.capped and call.request is not None:
            call.draft["max_output_tokens"] = call.request.max_output_tokens

    def fit(self, call: Call, refused: Refused) -> int | None:
        """The largest maximum output with which the call would fit on every account, or None when none does."""
        request, price, estimate = call.request, call.price, call.estimate
        if request is None or price is None or estimate is None or call.usage is not None:
            return None
        if refused.mark is not None or refused.asked <= refused.account.available:
            return None  # it is not for want of room
        most = request.max_output_tokens or price.max_output_tokens or estimate.max_output_tokens
        for account, asked in refused.lines:
            unit, free = account.rule.unit, account.available
            if asked <= free or not account.rule.enforce:
                continue
            if unit == "USD":
                tokens, tier, region = estimate.input_tokens, call.service_tier, call.region
                media = bool(request.media)
                input_nanos = price.bound_nanos(tokens, 0, media=media, service_tier=tier, region=region)
                if estimate.strict:
                    input_nanos += self._fees_bound(call)
                fit = price.fit_output_tokens(free, input_nanos, input_tokens=tokens, service_tier=tier, region=region)
            elif unit == "tokens":
                fit = free - estimate.input_tokens
            else:
                return None
            most = min(most, fit // max(1, estimate.answers))
        return most if most >= MIN_OUTPUT_TOKENS else None


def _said(call: Call, usage: Usage, cost_nanos: int, attempts: int = 1, *, is_bound: bool = False) -> dict[str, int]:
    """The amounts of what the caller said that the call will be billed."""
    call.estimate = Estimate(
        usage.input_tokens * attempts,
        usage.output_tokens * attempts,
        usage.output_tokens,
        attempts,
        is_bound,
        "the caller's count",
    )
    return amounts_of(call.estimate, cost_nanos * attempts, requests=attempts)


def amounts_of(estimate: Estimate, cost_nanos: int, *, requests: int) -> dict[str, int]:
    tokens = estimate.input_tokens + estimate.output_tokens
    return {"USD": cost_nanos, "tokens": tokens, "requests": requests, "failures": 0, "slots": 1}
