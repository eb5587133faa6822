"""Bursar: the face of it all. Opens the store, holds the policy, and drives the guard's steps, sync and async."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

from bursar.accounts import Account
from bursar.budget import Budget
from bursar.call import CHARGE_UNITS, CallOptions, Reload, Step, ToolOptions
from bursar.clock import Clock
from bursar.commands import Alert, Definitions
from bursar.decisions import Decisions, renewed
from bursar.detect import Detectors
from bursar.driver import Driver
from bursar.ending import drain
from bursar.errors import InvalidInput, OperatorRequired, PolicyError, StoreError, shown
from bursar.guard import Guard, log
from bursar.making import CallMaker
from bursar.notices import nobody
from bursar.policy import Policy
from bursar.prices import PriceBook
from bursar.records import BudgetStatus, UsageRecord
from bursar.reservation import Block, Reservation, tool_cost
from bursar.scope import (
    ENVIRONMENT,
    HEADER,
    Scope,
    active,
    check_tags,
    current,
    from_carried,
    to_baggage,
)
from bursar.settings import Settings
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.trust import ENVIRONMENT as OPERATOR
from bursar.trust import Trust

if TYPE_CHECKING:
    from bursar.alerts import Alerts, Deliverer

Client = TypeVar("Client")
_CLOSING_S = 5.0  # how long `close` waits for the ends of calls that are booked in the background


class Bursar:
    """Budgets for the agents of this process, over a store that may be shared.

    `store`: "memory:", "sqlite:///bursar.db" (relative), "sqlite:////var/lib/bursar.db" (absolute); SQLite takes
    `?durability=process` (survives the end of processes, not of the machine) beside the default `full`. `budgets`: see
    Budget; they are published to the store, where the newest version of a name is in force (None: all that are published
    there already). `prices`: a PriceBook with own rates. `rates`: US dollars per unit of other currencies used in limits.
    `on_expiry`: what becomes of a reservation whose process died, "charge" (booked as estimated) or "release".
    `max_accounts`: how many accounts one budget may have. `detectors`: what is done about runs that loop, retry or spend too
    fast: "report" tells of them by alerts, a Detectors acts as it says, "off" does not look. `require`: tags that every call
    has to carry. `default_limit`: what a run may spend ("1 USD") whose calls no budget limits. `alerts`: who is told of
    crossed thresholds and findings, beside the log. `operator`: the public key of the one operator that this process trusts
    (the environment's BURSAR_OPERATOR overrides it); a store with another one is refused. `tags`: on every call that has no such
    tags of its own. `clock` and `ids` are for tests and simulations.
    Raises PolicyError, InvalidInput or StoreError.
    """

    def __init__(
        self,
        store: str | Store = "memory:",
        budgets: Iterable[Budget] | None = None,
        *,
        prices: PriceBook | None = None,
        rates: Mapping[str, str] | None = None,
        on_expiry: str = "charge",
        max_accounts: int = 1_000_000,
        detectors: Detectors | Literal["report", "off"] = "report",
        require: Sequence[str] = (),
        default_limit: str | None = None,
        alerts: Alerts | None = None,
        operator: str | None = None,
        tags: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        ids: Callable[[], str] | None = None,
    ) -> None:
        if on_expiry not in ("charge", "release"):
            raise InvalidInput(f'{on_expiry!r} is no on_expiry. Use "charge" or "release".', argument="on_expiry")
        if type(max_accounts) is not int or max_accounts < 1:
            raise InvalidInput(
                f"max_accounts cannot be {shown(max_accounts)}. Use a whole number from 1.", argument="max_accounts"
            )
        tags = check_tags(tags or {})
        self._trust = Trust(os.environ.get(OPERATOR) or operator)
        self._settings = settings = Settings.of(
            budgets,
            prices=prices,
            rates=rates,
            detectors=detectors,
            require=require,
            default_limit=default_limit,
            alerts=alerts,
        )
        self.guard = Guard(settings.policy, settings.book, on_expiry=on_expiry, max_accounts=max_accounts)
        self.guard.notices.sentry = settings.sentry()
        self.store: Store = open_store(store, clock) if isinstance(store, str) else store
        self._make = CallMaker(self.guard, self.store, tags, ids)
        self._driver = Driver(self.guard, self.store, self._load_policy)
        self._held: tuple[int, Definitions] = (0, {})  # a version of the policy, and all that stands in it
        if hasattr(self.store, "on_crossed"):  # a store with leases: what crosses a mark there is sent later
            self.store.on_crossed(self._crossed)
        self._deliverer = self._deliver(alerts)
        try:
            self._trust.appoint(self.store)
            self.store.publish(settings.definitions())
            self._load_policy()
        except BaseException:
            if isinstance(store, str):
                self.store.close()
            raise

    @classmethod
    def from_policy(cls, path: str | Path, **options: Any) -> Bursar:
        """As a TOML or YAML policy file says; the environment's BURSAR_STORE overrides its store, `options` what they name.

        The file is read again when it changes, and takes effect within seconds, whole or not at all; see docs/policy.md.
        """
        from bursar.policy_file import PolicyWatch

        watch = PolicyWatch(path, options)
        bursar = cls(os.environ.get("BURSAR_STORE") or watch.policy.store, **watch.options)
        bursar._driver.keeper.look_too(partial(watch.look, bursar.store, bursar._take))
        return bursar

    @contextlib.contextmanager
    def scope(self, *, budget: str | None = None, carried: str | None = None, **tags: str | None) -> Generator[Scope]:
        """Tags for every call inside the block, in this thread or task and what it starts. Scopes nest.

        The accounts of outer scopes hold for inner calls too. `budget`: a limit of this scope's own, such as "0.20 USD";
        it belongs to the scope's tags, without any to this block alone. `carried`: the `baggage` header of another process's
        request, whose scope becomes the outer one, so that what is spent here counts on its accounts too.
        """
        own = check_tags(tags)
        if budget is not None:
            self.guard.policy.check_limit(budget)
            # a name for this block, else all blocks without tags would share one limit
            own = own or {"scope": self._make.id()}
        scope = Scope(own, active() if carried is None else from_carried(carried), budget)
        token = current.set(scope)
        try:
            yield scope
        finally:
            current.reset(token)

    def scope_environ(self) -> dict[str, str]:
        """The scope in force as an environment variable: a child process that gets it spends from this one's accounts.

        `subprocess.run(command, env=os.environ | bursar.scope_environ())`
        """
        scope = active()
        return {} if scope is None else {ENVIRONMENT: scope.as_text()}

    def scope_headers(self) -> dict[str, str]:
        """The scope in force as a W3C `baggage` header, for a remote agent: it opens `bursar.scope(carried=header)`."""
        scope = active()
        return {} if scope is None else {HEADER: to_baggage(scope)}

    # -- calls ---------------------------------------------------------------------------------------------------

    def reserve(self, provider: str, model: str, **options: Unpack[CallOptions]) -> Reservation:
        """Reserve the worst case of one call before it is sent. Options: see CallOptions.

        Raises BudgetExceeded, UnknownPrice, UnboundedEstimate, IdempotencyConflict, StoreError or InvalidInput.
        """
        call = self._make.model(provider, model, **options)
        reservation = Reservation(self._driver, call)
        self._driver.reserve(call)
        return reservation

    async def areserve(self, provider: str, model: str, **options: Unpack[CallOptions]) -> Reservation:
        """As `reserve`, for async callers."""
        call = self._make.model(provider, model, **options)
        reservation = Reservation(self._driver, call)
        await self._driver.areserve(call)
        return reservation

    def call(self, provider: str, model: str, **options: Unpack[CallOptions]) -> Block:
        """A block around one call (`with`, or `async with`): reserved on entering, extended while it lasts.

        Settle inside with the provider's answer. Left unsettled, it books the reserved amount as estimated, unless the
        error says that nothing was generated. Options and errors as for `reserve`.
        """
        return Block(self._driver, self._make.model(provider, model, **options))

    acall = call

    def tool(self, name: str, *, cost: str | None = None, **options: Unpack[ToolOptions]) -> Block:
        """A block around one tool call. It costs `cost` ("0.002 USD"), else the tool's price in the price book, else nothing.

        `settle("0.003 USD")` inside books another cost. Counts one of the unit `calls`. Raises BudgetExceeded, StoreError.
        """
        return Block(self._driver, self._make.tool(name, cost=cost, **options))

    atool = tool

    def charge(self, cost: str, *, tool: str | None = None, **options: Unpack[ToolOptions]) -> UsageRecord:
        """Book a cost that has been incurred outside of calls, such as "0.002 USD". It is never refused."""
        return self._driver.run(self._charging(cost, tool, **options))

    async def acharge(self, cost: str, *, tool: str | None = None, **options: Unpack[ToolOptions]) -> UsageRecord:
        """As `charge`, for async callers."""
        return await self._driver.arun(self._charging(cost, tool, **options))

    def wrap(self, client: Client, provider: str | None = None) -> Client:
        """A guarded twin of a client of the packages openai or anthropic (sync or async); the given one stays as it is.

        Every call of the twin, and of its `with_options`, reserves before it is sent and settles to what was billed. What
        nothing bounds (batches, live sessions, training) raises UnboundedEstimate. `provider`: who bills, where the base URL
        does not tell. Raises InvalidInput for other objects. See docs/wrap.md.
        """
        from bursar.wrap import wrap_client

        return wrap_client(self, client, provider)

    def _charging(self, cost: str, tool: str | None, **options: Any) -> Generator[Step, Any, UsageRecord]:
        cost_nanos = tool_cost(cost or "")
        assert cost_nanos is not None
        call = self._make.tool(tool or "charge", cost=cost, **options)
        if tool is None:
            call.tool, call.connection = "", options.get("connection") or ""
        call.units = CHARGE_UNITS
        try:
            if self.store.version() != self.guard.policy.version:  # no refusal tells who only charges of a newer policy
                try:
                    yield Reload()
                except (PolicyError, OperatorRequired) as error:
                    # calls are refused then; this cost is there all the same
                    log.error("%s What was incurred is booked by the policy of before.", error)
            entry = yield from self.guard.charge(call, {"USD": cost_nanos}, self.store.now_us())
        except StoreError:
            self._driver.keeper.start()
            raise
        return UsageRecord.of(entry)

    # -- the books -----------------------------------------------------------------------------------------------

    def status(self, **tags: str) -> list[BudgetStatus]:
        """The accounts as they stand now: with tags, those whose scope has these values, and those that hold for all."""
        wanted = check_tags(tags).items()
        now_us = self.store.now_us()
        policy = self.guard.policy
        accounts = [policy.in_force(account, now_us) for account in self.store.accounts()]
        used = {account.rule.key for account in accounts}
        accounts += [fresh for fresh in policy.fresh_accounts(now_us) if fresh.rule.key not in used]
        current_ones = (one for one in accounts if one.rule.end_us is None or one.rule.end_us > now_us)
        found = [BudgetStatus.of(account, now_us) for account in current_ones]
        return [one for one in found if not one.scope or wanted <= one.scope.items()]

    def records(self, **tags: str) -> Iterator[UsageRecord]:
        """The usage records with these tags, in the order of their ids: that of time, unless callers gave ids."""
        return map(UsageRecord.of, self.store.entries(check_tags(tags)))

    def tend(self) -> None:
        """One round of housekeeping: extend live calls, book kept settlements, expire what is overdue.

        A background thread does this every few seconds while calls are made.
        """
        self._driver.keeper.tend()

    def close(self) -> None:
        """Book the ends that wait, a last time, and close the store. Open reservations stay, and expire."""
        drain(_CLOSING_S)
        self._driver.keeper.stop()
        if self._deliverer is not None:
            self._deliverer.close()
        self.store.close()

    def __enter__(self) -> Bursar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _crossed(self, alerts: tuple[Alert, ...], accounts: tuple[Account, ...]) -> None:
        self._driver.run(self.guard.notices.crossed(alerts, accounts, self.guard.policy))

    def _deliver(self, alerts: Alerts | None) -> Deliverer | None:
        if alerts is None or not alerts.configured:  # what nobody else is told of is in the log already
            return None
        from bursar.alerts import Deliverer

        deliverer = Deliverer(self.store, alerts)
        deliverer.start()
        self.guard.notices.told = deliverer.wake
        return deliverer

    def _deliver_elsewhere(self, alerts: Alerts | None) -> None:
        """Other sinks from now on; what the old ones have not taken is due again."""
        before, self._deliverer = self._deliverer, None
        self.guard.notices.told = nobody
        self._deliverer = self._deliver(alerts)
        if before is not None:  # it waits for slow sinks, and the keeper must not
            threading.Thread(target=before.close, daemon=True, name="bursar-alerts-end").start()

    def _load_policy(self) -> int:
        """Take the newest definitions of this process's budgets, and what operators decided, from the store; the store's time."""
        settings = None
        # again where another thread has taken other settings meanwhile: else what was made of the old ones might stay
        while settings is not self._settings:
            settings = self._settings
            version, held = self._newest_definitions()
            self._trust.check(held)
            budgets = [Budget.of(one) for one in self._trust.budgets(held, settings.names)]
            given = settings.policy
            self.guard.policy = Policy(
                budgets, version=version, rates=given.rates, decisions=Decisions(held), default=given.default
            )
        return self.store.now_us()

    def _newest_definitions(self) -> tuple[int, Definitions]:
        """Only what has come since the last look is read: every kill adds a definition, however many there are already."""
        since, held = self._held
        version, newer = self.store.definitions(since)
        if version < since:  # the store is another one, such as a backup that was put in its place
            held = {}
            version, newer = self.store.definitions()
        self._held = found = version, renewed(held, newer, self.store.now_us())
        return found

    def _take(self, settings: Settings) -> None:
        """Put other settings in force. Raises StoreError or OperatorRequired, and then nothing has changed."""
        self.store.publish(settings.definitions())
        before, self._settings = self._settings, settings
        self.guard.book = settings.book
        if (settings.detectors, settings.require) != (before.detectors, before.require):
            self.guard.notices.sentry = settings.sentry()
        if settings.alerts is not before.alerts:
            self._deliver_elsewhere(settings.alerts)
        self._load_policy()
