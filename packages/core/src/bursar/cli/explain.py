"""What a policy means for one call: the accounts that it is held against, how they stand, and why others are not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bursar.accounts import Account, age, in_force, reached, under
from bursar.budget import Budget
from bursar.call import MODEL_UNITS, TOOL_UNITS
from bursar.cli.options import echo
from bursar.decisions import Decisions
from bursar.errors import UnknownPrice
from bursar.policy import NONE, Matched, Policy, limits
from bursar.policy_file import PolicyFile
from bursar.records import BudgetStatus, amount
from bursar.scope import Scope
from bursar.settings import DEFAULT, Settings
from bursar.stores.base import Store

OWN_RUN = "(its own)"
_OF_THE_CALL = ("provider", "model", "tool", "connection")


class Explained(NamedTuple):
    """The accounts of a call, in the order in which they are tried; the budgets that are not about it; what else matters."""

    accounts: list[dict[str, Any]]
    unmatched: list[dict[str, Any]]
    notes: list[str]


def explain(file: PolicyFile, tags: Mapping[str, str], store: Store | None, now_us: int) -> Explained:
    """What becomes of a call with these tags under this policy, with the balances and decisions of the store where there is one."""
    settings = file.options()
    decisions = Decisions(store.definitions()[1]) if store is not None else Decisions()
    given = Settings.of(**settings).policy
    policy = Policy(given.budgets, rates=file.rates, decisions=decisions, default=given.default)
    own = {tag: tags.get(tag, "") for tag in _OF_THE_CALL}
    own["connection"] = own["connection"] or own["tool"] or own["provider"]
    scope = Scope({"run": OWN_RUN, **{tag: value for tag, value in tags.items() if tag not in _OF_THE_CALL}})
    units = TOOL_UNITS if own["tool"] else MODEL_UNITS
    matched = policy.match(scope, units, now_us, **own)
    held = {} if store is None else {one.rule.key: one for one in store.accounts([one.rule.key for one in matched])}
    accounts = [_account(one, held.get(one.rule.key), now_us) for one in matched]
    all_tags = {**scope.tags, **{tag: value for tag, value in own.items() if value}}
    found = {one.budget.name for one in matched}
    unmatched = [
        {"budget": budget.name, "why": _why_not(budget, policy, all_tags, units)}
        for budget in policy.budgets
        if budget.name not in found
    ]
    notes = [*_notes(file, settings, own, all_tags, matched, now_us)]
    switch = policy.stop(scope, {tag: value for tag, value in own.items() if value}, matched)
    if switch is not None:
        notes.insert(
            0,
            f"It is stopped now by the switch {switch.name!r} ({switch.cause}). bursar resume {shlex.quote(switch.name)}",
        )
    return Explained(accounts, unmatched, notes)


def _account(one: Matched, account: Account | None, now_us: int) -> dict[str, Any]:
    rule, budget = one.rule, one.budget
    fresh = Account(rule, level=rule.limit if rule.kind == "refill" else 0, at_us=now_us)
    account = fresh if account is None else age(under(account, rule), now_us)
    status = BudgetStatus.of(account, now_us)
    since, until = status.window
    return {
        "budget": budget.name,
        "scope": status.scope,
        "unit": rule.unit,
        "limit": status.limit,
        "spent": status.spent,
        "reserved": status.reserved,
        "available": status.available,
        "window": _window(budget),
        "from": since and since.isoformat(),
        "until": until and until.isoformat(),
        "ladder": list(_ladder(budget, account)),
        "when_short": _when_short(budget),
        "estimate": budget.estimate,
        "on_unreachable": budget.on_unreachable,
        "owner": budget.owner,
    }


def _ladder(budget: Budget, account: Account) -> Iterator[dict[str, Any]]:
    """Each threshold: from which amount, and whether it holds for the next call, or has been told."""
    rule = account.rule
    holding, passed = in_force(account), reached(rule, account.spent)
    for index, threshold in enumerate(budget.ladder):
        mark = rule.marks[index]
        yield {
            **threshold.definition(),
            "from": amount(mark.at, rule.unit),
            "holds": index in holding if threshold.action != "notify" else index < passed,
            "waived": mark.action == "waived",
        }


def _window(budget: Budget) -> str:
    if "/" in budget.limit:
        return "refilled continuously"
    return budget.window if budget.tz == "UTC" or budget.window == "total" else f"{budget.window} {budget.tz}"


def _when_short(budget: Budget) -> str:
    if budget.mode == "shadow":
        return "records it, refuses nothing (shadow)"
    return f"waits up to {budget.wait_s:g} s, then refuses" if budget.wait_s else "refuses"


def _why_not(budget: Budget, policy: Policy, tags: Mapping[str, str], units: Iterable[str]) -> str:
    if budget.mode == "off":
        return 'mode = "off"'
    unit, _ = policy.account_name(budget)
    if unit not in units:
        return f"such a call uses no {unit}"
    for tag, value in (budget.match or {}).items():
        if not policy.accepts(budget, tag, tags.get(tag, NONE)):
            wanted = value if isinstance(value, str) else " or ".join(value)
            return f"it is for {tag} {wanted}, not {tags.get(tag, NONE)}"
    return "it is not about this call"


def _notes(
    file: PolicyFile,
    settings: Mapping[str, Any],
    own: Mapping[str, str],
    tags: Mapping[str, str],
    matched: tuple[Matched, ...],
    now_us: int,
) -> Iterator[str]:
    missing = [tag for tag in file.require if tag not in tags]
    if missing:
        yield f"It is refused for want of {', '.join(missing)}: the policy requires {', '.join(file.require)}."
    if own["model"]:
        try:
            price = settings["prices"].find(own["provider"], own["model"], now_us, tags)
            since = f" since {price.effective_from}" if price.effective_from else ""
            yield f"It is priced as {price.provider}/{price.model}{since}, source: {price.source}."
        except UnknownPrice as error:
            yield f"It is refused: {error}"
    if any(one.rule.budget == DEFAULT for one in matched):
        yield f"No budget limits it: the default_limit of {file.default_limit} a run does."
    elif not any(limits(one.rule) for one in matched):
        action = "notify" if isinstance(file.detectors, str) else file.detectors.make().uncapped
        told = "nothing watches for that" if file.detectors == "off" or action == "off" else f"action: {action}"
        yield f"No budget limits what it may spend ({told}). Add one that matches it, or a default_limit."


def show_explained(found: Explained, tags: Mapping[str, str], books: str) -> None:
    """Print tables for people. `books`: where the balances are from."""
    from rich.console import Console

    from bursar.cli.books import plain, table

    console = Console(highlight=False)
    call = " ".join(f"{tag}={value}" for tag, value in tags.items()) or "without tags"
    accounts = table(
        f"A call {call} ({books})", "account", "limit", "spent", "reserved", "left", "window", "when short"
    )
    for one in found.accounts:
        scope = " ".join(f"{tag}={value}" for tag, value in one["scope"].items())
        limit = f"{one['limit']} {one['unit']}"
        cells = (one["spent"], one["reserved"], one["available"], one["window"], one["when_short"])
        accounts.add_row(plain(f"{one['budget']} {scope}".rstrip()), limit, *(plain(str(cell)) for cell in cells))
    console.print(accounts)
    steps = [(one, step) for one in found.accounts for step in one["ladder"]]
    if steps:
        ladder = table("Thresholds", "account", "at", "from", "action", "now")
        for one, step in steps:
            ladder.add_row(plain(one["budget"]), step["at"], f"{step['from']} {one['unit']}", _action(step), _now(step))
        console.print(ladder)
    if found.unmatched:
        others = table("Not held against it", "budget", "why")
        for other in found.unmatched:
            others.add_row(plain(other["budget"]), plain(other["why"]))
        console.print(others)
    for note in found.notes:
        echo(note)


def _action(step: Mapping[str, Any]) -> str:
    models = ", ".join(f"{model} to {other}" for model, other in step.get("models", {}).items())
    most = f"{step['max_output_tokens']} tokens" if "max_output_tokens" in step else ""
    return f"{step['action']} {models or most or step.get('rate', '')}".rstrip()


def _now(step: Mapping[str, Any]) -> str:
    if step["waived"]:
        return "approved"
    if not step["holds"]:
        return ""
    return "told" if step["action"] == "notify" else "holds"
