"""The ladder: what a budget's thresholds do to a call that is about to be sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from bursar.accounts import ACTIONS, Rule
from bursar.budget import Budget, Threshold
from bursar.call import Call
from bursar.errors import UnknownPrice
from bursar.policy import Matched, throttle_rule

THROTTLE_WAIT_S = 600  # how long a throttled call waits for its turn at most

log = logging.getLogger("bursar")


def comply(call: Call, one: Matched, rung: int, now_us: int) -> Threshold | None:
    """Do what the first `rung` thresholds of this account ask for, as far as the call's maker lets it be changed.

    Returns the threshold that nothing but an operator's approval can satisfy, where there is one.
    """
    ladder = one.budget.ladder
    for index in range(call.complied.get(one.rule.key, 0), rung):
        threshold = ladder[index]
        if not _do(call, one.rule, threshold, now_us):
            stricter = _next_stricter(ladder, index)
            instead = "ask" if stricter is None else stricter.action
            say(call, f"{threshold.action} cannot be carried out here: {instead} instead ({_where(one, threshold)})")
            if stricter is None or not _do(call, one.rule, stricter, now_us):
                return threshold
        call.complied[one.rule.key] = index + 1
    return None


def _next_stricter(ladder: tuple[Threshold, ...], index: int) -> Threshold | None:
    """The mildest of the further thresholds that may take this one's place; without one, an operator is asked."""
    least = ACTIONS.index(ladder[index].action)
    later = [one for one in ladder[index + 1 :] if least < ACTIONS.index(one.action) < ACTIONS.index("ask")]
    return min(later, key=lambda one: ACTIONS.index(one.action), default=None)


def _do(call: Call, rule: Rule, threshold: Threshold, now_us: int) -> bool:
    """Whether the threshold's action is carried out, or has nothing to change."""
    if threshold.action == "downgrade":
        return _downgrade(call, threshold, now_us)
    if threshold.action == "clamp":
        return _clamp(call, threshold)
    if threshold.action == "throttle" and threshold.rate is not None:
        throttles = throttled(call.throttles, rule, threshold.rate, call.units)
        if throttles != call.throttles:
            call.throttles = throttles
            say(call, f"throttle {threshold.rate} at {threshold.at} of {rule.budget}")
    return True


def throttled(throttles: tuple[Matched, ...], rule: Rule, rate: str, units: Sequence[str]) -> tuple[Matched, ...]:
    """The throttles of a call with this one among them; of two on the same account the stricter one holds."""
    beside = throttle_rule(rule, rate)
    same = next((one for one in throttles if one.rule.key == beside.key), None)
    if beside.unit not in units or (same is not None and same.rule.limit <= beside.limit):
        return throttles
    waiting = Budget(rule.budget, rate, on_exceed=f"wait {THROTTLE_WAIT_S}s")
    return (*(one for one in throttles if one is not same), Matched(waiting, beside))


def _downgrade(call: Call, threshold: Threshold, now_us: int) -> bool:
    models = threshold.models or {}
    wanted = next((to for model, to in models.items() if fnmatchcase(call.model, model)), call.model)
    if call.request is None or wanted == call.model:
        return True
    if "model" not in call.changeable:
        return False
    try:
        price = call.book.find(call.provider, wanted, now_us, {**call.tags(), "model": wanted})
    except UnknownPrice:
        return False  # such as a model that another provider sells
    say(call, f"downgrade {call.model} to {wanted} at {threshold.at}")
    call.model_asked = call.model_asked or call.model
    call.request = call.request.for_model(wanted)
    call.model, call.price = wanted, price
    most = price.max_output_tokens
    if most and (call.request.max_output_tokens or 0) > most and "max_output_tokens" in call.changeable:
        call.request.max_output_tokens, call.capped = most, True  # the provider refuses more than its model can
    return True


def _clamp(call: Call, threshold: Threshold) -> bool:
    request, most = call.request, threshold.max_output_tokens
    if request is None or request.embeds or most is None or call.usage is not None:
        return True
    limit = request.max_output_tokens or (None if call.price is None else call.price.max_output_tokens)
    if limit is not None and limit <= most:
        return True
    if "max_output_tokens" not in call.changeable:
        return False
    say(call, f"clamp to {most} tokens at {threshold.at}")
    request.max_output_tokens, call.capped, call.resize = most, True, False
    return True


def say(call: Call, what: str) -> None:
    """Note an action for the call's record and in the log."""
    call.actions = (*call.actions, what)
    log.info("%s (%s)", what, ", ".join(f"{tag}={value}" for tag, value in call.tags().items()))


def _where(one: Matched, threshold: Threshold) -> str:
    return f"at {threshold.at} of {one.budget.name}"
