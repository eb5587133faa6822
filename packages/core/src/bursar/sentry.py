"""The sentry: shows every call to the detectors, and says what their findings ask for."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bursar.accounts import Rule
from bursar.call import Call
from bursar.detect import Detectors, Finding, Watchtower
from bursar.policy import NONE, limits
from bursar.scope import process_run
from bursar.usage import Usage

MOST_TOLD = 4_096

log = logging.getLogger("bursar")


class Sign(NamedTuple):
    """What somebody has to be told, and what is to be done: `action` of the ladder; `wait_us` before the call may go."""

    name: str
    cause: str
    action: str
    why: str
    wait_us: int = 0


class Sentry:
    """Watches the calls of one Bursar. Without `acts` it tells and stops nothing; without `settings` it sees nothing.

    `require`: the tags that every call has to carry.
    """

    def __init__(self, settings: Detectors | None = None, *, acts: bool = False, require: Sequence[str] = ()) -> None:
        self.settings = settings
        self._tower = None if settings is None else Watchtower(settings)
        self._acts = acts
        self._require = tuple(require)
        self._told: OrderedDict[str, None] = OrderedDict()
        self._stopped: OrderedDict[str, Sign] = OrderedDict()
        self._failing: set[str] = set()  # connections that have failed once: of the others nothing is counted
        self._lock = threading.Lock()

    def anew(self) -> Sentry:
        """The same sentry for a fork's child, where the locks that its parent's threads held are held for ever."""
        fresh = Sentry(self.settings, acts=self._acts, require=self._require)
        fresh._stopped.update(self._stopped)
        return fresh

    def before(self, call: Call, rules: Sequence[Rule], now_us: int) -> list[Sign]:
        """What there is to say of this call before it is sent."""
        found: list[Sign | None] = []
        missing = [tag for tag in self._require if call.tags().get(tag, NONE) == NONE]
        if missing:
            why = f"The call carries no {' and no '.join(missing)}: its cost would be nobody's. Open a scope with these tags."
            found.append(Sign("unattributed", "shared budget without attribution", "block", why))
        tower, settings = self._tower, self.settings
        if tower is None or settings is None:
            return [sign for sign in found if sign is not None]
        stopped = self._stopped.get(call.run)
        if stopped is not None:
            return [*filter(None, found), stopped]
        if settings.uncapped != "off" and not any(map(limits, rules)):
            why = "No budget limits this call. Add one that matches it, or a default_limit."
            found.append(self._sign(Finding("uncapped", "no cap", settings.uncapped, why)))
        if _is_task(call):
            watch = tower.run(call.run)
            if call.request is not None:
                size = call.request.input_tokens or 0
                seen = _seen(watch.model_called, call.id, call.content, now_us, model=call.model, input_tokens=size)
                found.append(self._sign(seen))
            elif call.content is not None:
                found.append(self._sign(_seen(watch.tool_called, call.tool, call.content)))
        if call.connection in self._failing:
            found.append(self._sign(tower.connection(call.connection).check(now_us)))
        return [sign for sign in found if sign is not None]

    def answered(self, call: Call, answer: Any, cost_nanos: int, rules: Iterable[Rule], now_us: int) -> list[Sign]:
        """What the end of a call shows: its loop, its speed, the speed of the budgets that it spent from."""
        tower = self._tower
        if tower is None:
            return []
        found: list[Finding | None] = []
        if call.request is not None and _is_task(call):
            seen = None if isinstance(answer, Usage) else answer
            found.append(_seen(tower.run(call.run).model_answered, call.id, seen))
        if call.connection in self._failing:
            tower.connection(call.connection).ended(1, 0, now_us)
        if cost_nanos:
            found.append(tower.spender(call.scope.tags.get("agent") or call.run).spent(cost_nanos, now_us))
            for rule in rules:
                if rule.unit == "USD" and rule.end_us is not None:
                    burning = tower.spender(rule.key)
                    burning.spent(cost_nanos, now_us)
                    found.append(burning.burn(rule.limit, rule.end_us - rule.start_us, now_us))
        return [sign for finding in found if finding is not None and (sign := self._sign(finding)) is not None]

    def failed(self, call: Call, now_us: int) -> None:
        """A call has failed: its next attempt has to wait, and a connection that fails for many is a storm."""
        if self._tower is None:
            return
        if call.request is not None and _is_task(call):
            self._tower.run(call.run).model_failed(call.id, now_us)
        if call.connection:
            if len(self._failing) > MOST_TOLD:
                self._failing.clear()
            self._failing.add(call.connection)
            self._tower.connection(call.connection).ended(1, 1, now_us)

    def stop(self, call: Call, sign: Sign) -> None:
        """The run is over: a framework that hands the refusal back to its model would go on with another request."""
        if self._tower is not None and _is_task(call):
            with self._lock:
                self._stopped[call.run] = sign
                if len(self._stopped) > MOST_TOLD:
                    self._stopped.popitem(last=False)

    def forgive(self, call: Call) -> None:
        """An operator lets the run go on: what was seen of it counts no more."""
        if self._tower is not None:
            self._tower.run(call.run).forgive()
            self._stopped.pop(call.run, None)

    def is_news(self, sign: Sign, call: Call) -> bool:
        """Whether nobody was told of this yet: once per detector and run, or agent where it is no matter of one run."""
        key = _matter(sign, call)
        with self._lock:
            if key in self._told:
                return False
            self._told[key] = None
            if len(self._told) > MOST_TOLD:
                self._told.popitem(last=False)
            return True

    def untold(self, sign: Sign, call: Call) -> None:
        """The store could not take it: it is news still."""
        with self._lock:
            self._told.pop(_matter(sign, call), None)

    def _sign(self, finding: Finding | None) -> Sign | None:
        if finding is None or finding.action == "off":
            return None
        if not self._acts:
            return Sign(finding.detector, finding.cause, "notify", finding.why)
        return Sign(finding.detector, finding.cause, finding.action, finding.why, finding.wait_us)


def _seen(look: Callable[..., Finding | None], *args: Any, **said: Any) -> Finding | None:
    """What a detector finds; nothing where it cannot read what it is shown."""
    try:
        return look(*args, **said)
    except Exception as error:  # whatever a message is made of, a look at it must not fail the call
        log.warning("detectors cannot read a call, and do not see it: %s", type(error).__name__, exc_info=True)
        return None


def _matter(sign: Sign, call: Call) -> str:
    who = call.scope.tags.get("agent", "") if sign.name == "uncapped" else call.run
    return f"{sign.name} {who}"


def _is_task(call: Call) -> bool:
    """Whether the call's run is one task of one agent: a whole process answers many, and the same question twice is no loop."""
    return call.run != process_run()
