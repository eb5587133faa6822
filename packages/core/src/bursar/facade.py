"""Bursar: the face of it all. Opens the store, holds the policy, and drives the guard's steps, sync and async."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from bursar.clock import Clock
from bursar.commands import Charge, Extend, Rejected, Release, Settle
from bursar.errors import InvalidInput, StoreError
from bursar.estimate import Request
from bursar.guard import CHARGE_UNITS, MODEL_UNITS, TOOL_UNITS, Call, Guard, Pause, Post, Reload, Step, Steps, log
from bursar.policy import Budget, Policy
from bursar.prices import PriceBook
from bursar.records import BudgetStatus, UsageRecord
from bursar.reservation import Block, Reservation, tool_cost
from bursar.scope import Scope, check_tags, current, process_run
from bursar.stores.base import Store

TTL_S = 600.0
TEND_S = 5.0
MAX_LIVE_S = 6 * 3_600.0  # a call block that lasts longer is no longer extended
MAX_KEPT = 10_000


class Bursar:
    """Budgets for the agents of this process, over a store that may be shared.

    `store`: "memory:", "sqlite:///bursar.db" (relative), "sqlite:////var/lib/bursar.db" (absolute); SQLite takes
    `?durability=process` (survives the end of processes, not of the machine) beside the default `full`. `budgets`: see Budget;
    they are published to the store, where the newest version of a name is in force. `prices`: a PriceBook with own rates.
    `rates`: US dollars per unit of other currencies used in limits. `on_expiry`: what becomes of a reservation whose process died:
    "charge" (booked as estimated) or "release". `max_accounts`: how many accounts one budget may have.
    Raises PolicyError, InvalidInput or StoreError.
    """

    def __init__(
        self,
        store: str | Store = "memory:",
        budgets: Iterable[Budget] = (),
        *,
        prices: PriceBook | None = None,
        rates: Mapping[str, str] | None = None,
        on_expiry: str = "charge",
        max_accounts: int = 1_000_000,
        clock: Clock | None = None,
        ids: Callable[[], str] | None = None,
    ) -> None:
        if on_expiry not in ("charge", "release"):
            raise InvalidInput(f'{on_expiry!r} is no on_expiry. Use "charge" or "release".', argument="on_expiry")
        self._rates = dict(rates or {})
        policy = Policy(budgets, rates=self._rates)
        self.store: Store = open_store(store, clock) if isinstance(store, str) else store
        self._names = [budget.name for budget in policy.budgets]
        self.guard = Guard(policy, prices or PriceBook.packaged(), on_expiry=on_expiry, max_accounts=max_accounts)
        try:
            self.store.publish({budget.name: budget.definition() for budget in policy.budgets})
            self._load_policy()
        except BaseException:
            self.store.close()
            raise
        self._new_id = ids
        self._live: dict[str, tuple[Call, int]] = {}
        self._kept: dict[str, tuple[Call, Settle | Release | Charge]] = {}
        self._keeper: threading.Thread | None = None
        self._keeper_pid = 0
        self._stop = threading.Event()

    @classmethod
    def from_policy(cls, path: str | Path, **options: Any) -> Bursar:
        """Store, budgets and prices from a TOML or YAML policy file; the environment's BURSAR_STORE overrides the store."""
        from bursar.policy_file import read_policy

        policy = read_policy(path)
        store = os.environ.get("BURSAR_STORE") or policy.store
        return cls(store, policy.make_budgets(), prices=policy.make_prices(), rates=policy.rates, **options)

    # -- scopes --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, *, budget: str | None = None, **tags: str | None) -> Generator[Scope]:
        """Tags for every call inside the block, in this thread or task and what it starts. Scopes nest.

        The accounts of outer scopes hold for inner calls too. `budget`: a limit of this scope's own, such as "0.20 USD".
        """
        scope = Scope(check_tags(tags), current.get(), budget)
        if budget is not None:
            self.guard.policy.check_limit(budget)
        token = current.set(scope)
        try:
            yield scope
        finally:
            current.reset(token)

    def _scope(self, tags: Mapping[str, str] | None, defaults: Mapping[str, str] | None) -> Scope:
        scope = current.get()
        if scope is None:
            leaf = {**(defaults or {}), **check_tags(tags or {})}
            return Scope(leaf if "run" in leaf else {**leaf, "run": process_run()})
        if "run" in scope.tags and not tags and not defaults:
            return scope
        return scope.with_tags(check_tags(tags or {}), {"run": process_run(), **(defaults or {})})

    # -- calls ---------------------------------------------------------------------------------------------------

    def _model_call(
        self,
        provider: str,
        model: str,
        messages: str | Sequence[Any] | None,
        input_tokens: int | None,
        max_output_tokens: int | None,
        body: Mapping[str, Any] | None,
        n: int,
        retries: int,
        endpoint: str | None,
        resize: bool | None,
        connection: str | None,
        tags: Mapping[str, str] | None,
        default_tags: Mapping[str, str] | None,
        id: str | None,
        ttl_s: float,
    ) -> Call:
        request = Request(
            provider,
            model,
            messages=messages,
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            body=body,
            n=n,
            retries=retries,
            endpoint=endpoint,
        )
        call = self._call(MODEL_UNITS, tags, default_tags, id, ttl_s)
        call.provider, call.model, call.request = provider, model, request
        call.connection = connection or provider
        call.resize = request.max_output_tokens is None if resize is None else resize
        tier = body.get("service_tier") if body else None
        call.service_tier = tier if isinstance(tier, str) else None
        return call

    def _tool_call(
        self, name: str, cost: str | None, connection: str | None, tags: Mapping[str, str] | None,
        default_tags: Mapping[str, str] | None, id: str | None, ttl_s: float,
    ) -> Call:
        price = tool_cost(cost)
        call = self._call(TOOL_UNITS, tags, default_tags, id, ttl_s)
        call.tool = check_tags({"tool": name})["tool"]
        call.connection = connection or name
        call.amounts = {"USD": (self.guard.book.tool_price(name) or 0) if price is None else price}
        return call

    def _call(
        self, units: tuple[str, ...], tags: Mapping[str, str] | None, default_tags: Mapping[str, str] | None,
        id: str | None, ttl_s: float,
    ) -> Call:
        if id is not None and not (isinstance(id, str) and 0 < len(id) <= 200 and id.isprintable() and id[0] not in "[#@"
                                   and not set(id) & set("~!")):
            raise InvalidInput(
                f"{id!r} cannot be an id. Use 1 to 200 printable characters without ~ and !, not starting with [, # or @.",
                argument="id",
            )
        if not 1 <= ttl_s <= 86_400:
            raise InvalidInput(f"ttl_s must be from 1 to 86,400 seconds, got {ttl_s!r}.", argument="ttl_s")
        scope = self._scope(tags, default_tags)
        return Call(id or self._id(), scope, units, int(ttl_s * 1e6), given_id=id is not None)

    def _id(self) -> str:
        # Ids rise with time, so that records are appended where the table ends.
        return self._new_id() if self._new_id is not None else f"{self.store.now_us():014x}-{secrets.token_hex(8)}"

    def reserve(
        self,
        provider: str,
        model: str,
        *,
        messages: str | Sequence[Any] | None = None,
        input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        body: Mapping[str, Any] | None = None,
        n: int = 1,
        retries: int = 0,
        endpoint: str | None = None,
        resize: bool | None = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = TTL_S,
    ) -> Reservation:
        """Reserve the worst case of one call before it is sent.

        Say what will be sent: `messages` or the whole request `body`, or its `input_tokens`; `max_output_tokens` where the
        request sets one (it must be enforced), `n` answers, the client's own `retries`. `resize` allows a smaller maximum output
        than asked for (default: only where none was set); then send the reservation's `max_output_tokens`. `tags` win over the
        scope's, `default_tags` do not. `id` makes the reservation repeatable: same id and content, no second effect.
        Raises BudgetExceeded, UnknownPrice, UnboundedEstimate, IdempotencyConflict, StoreError or InvalidInput.
        """
        call = self._model_call(
            provider, model, messages, input_tokens, max_output_tokens, body, n, retries, endpoint, resize, connection, tags,
            default_tags, id, ttl_s,
        )  # fmt: skip
        self._run(self._reserving(call))
        return Reservation(self, call)

    async def areserve(
        self,
        provider: str,
        model: str,
        *,
        messages: str | Sequence[Any] | None = None,
        input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        body: Mapping[str, Any] | None = None,
        n: int = 1,
        retries: int = 0,
        endpoint: str | None = None,
        resize: bool | None = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = TTL_S,
    ) -> Reservation:
        """As `reserve`, for async callers."""
        call = self._model_call(
            provider, model, messages, input_tokens, max_output_tokens, body, n, retries, endpoint, resize, connection, tags,
            default_tags, id, ttl_s,
        )  # fmt: skip
        await self._arun(self._reserving(call))
        return Reservation(self, call)

    def call(
        self,
        provider: str,
        model: str,
        *,
        messages: str | Sequence[Any] | None = None,
        input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        body: Mapping[str, Any] | None = None,
        n: int = 1,
        retries: int = 0,
        endpoint: str | None = None,
        resize: bool | None = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = TTL_S,
    ) -> Block:
        """A block around one call (`with`, or `async with`): reserved on entering, extended while it lasts.

        Settle inside with the provider's answer. Left unsettled, it books the reserved amount as estimated, unless the
        error says that nothing was generated. Arguments and errors as for `reserve`.
        """
        return Block(
            self,
            self._model_call(
                provider, model, messages, input_tokens, max_output_tokens, body, n, retries, endpoint, resize, connection,
                tags, default_tags, id, ttl_s,
            ),
        )  # fmt: skip

    acall = call

    def tool(
        self,
        name: str,
        *,
        cost: str | None = None,
        connection: str | None = None,
        tags: Mapping[str, str] | None = None,
        default_tags: Mapping[str, str] | None = None,
        id: str | None = None,
        ttl_s: float = TTL_S,
    ) -> Block:
        """A block around one tool call. It costs `cost` ("0.002 USD"), else the tool's price in the price book, else nothing.

        `settle("0.003 USD")` inside books another cost. Counts one of the unit `calls`. Raises BudgetExceeded, StoreError.
        """
        return Block(self, self._tool_call(name, cost, connection, tags, default_tags, id, ttl_s))

    atool = tool

    def charge(
        self, cost: str, *, tool: str | None = None, connection: str | None = None, tags: Mapping[str, str] | None = None,
        id: str | None = None,
    ) -> UsageRecord:
        """Book a cost that has been incurred outside of calls, such as "0.002 USD". It is never refused."""
        record = self._run(self._charging(cost, tool, connection, tags, id))
        assert isinstance(record, UsageRecord)
        return record

    async def acharge(
        self, cost: str, *, tool: str | None = None, connection: str | None = None, tags: Mapping[str, str] | None = None,
        id: str | None = None,
    ) -> UsageRecord:
        """As `charge`, for async callers."""
        record = await self._arun(self._charging(cost, tool, connection, tags, id))
        assert isinstance(record, UsageRecord)
        return record

    def _charging(
        self, cost: str, tool: str | None, connection: str | None, tags: Mapping[str, str] | None, id: str | None
    ) -> Steps:
        found = tool_cost(cost)
        assert found is not None
        call = self._call(CHARGE_UNITS, tags, None, id, TTL_S)
        call.tool, call.connection = tool or "", connection or tool or ""
        matched = self.guard._matched(call, self.store.now_us())
        lines = tuple((one.rule, found) for one in matched)
        entry = yield from self.guard.charge(call, lines, found, {})
        return UsageRecord.of(entry)

    def release(self, id: str, reason: str = "released by an operator") -> UsageRecord | None:
        """Take an expired reservation off the books, when it is known that the provider did not bill it."""
        call = Call(id, Scope({}), MODEL_UNITS, 0)
        return Reservation(self, call).release(reason)

    # -- the books -----------------------------------------------------------------------------------------------

    def status(self, **tags: str) -> list[BudgetStatus]:
        """The accounts as they stand now: with tags, those whose scope has these values, and those that hold for all."""
        wanted = check_tags(tags).items()
        now_us = self.store.now_us()
        found = [BudgetStatus.of(account, now_us) for account in self.store.accounts()]
        found = [one for one in found if not one.scope or wanted <= one.scope.items()]
        names = {one.name for one in found}
        found += [
            status
            for budget in self.guard.policy.budgets
            if budget.name not in names and not budget.per
            for status in self._untouched(budget, now_us)
        ]
        return [one for one in found if one.window[1] is None or one.window[1].timestamp() * 1e6 > now_us]

    def _untouched(self, budget: Budget, now_us: int) -> list[BudgetStatus]:
        return [BudgetStatus.of(account, now_us) for account in self.guard.policy.fresh_accounts(budget, now_us)]

    def records(self, **tags: str) -> Iterator[UsageRecord]:
        """The usage records with these tags, oldest first."""
        return map(UsageRecord.of, self.store.entries(check_tags(tags)))

    # -- driving the guard's steps -------------------------------------------------------------------------------

    def _reserving(self, call: Call, *, live: bool = False) -> Steps:
        self._start_keeper()
        try:
            yield from self.guard.reserve(call, self.store.now_us())
        except StoreError as error:
            if error.fault == "accounts" or not self.guard.goes_unguarded(call, self.store.now_us()):
                raise
            log.error("%s Every budget of this call has on_unreachable=\"open\": it goes out unguarded.", error)
            call.state, call.reserved_us = "unguarded", self.store.now_us()
        if live:
            self._live[call.id] = (call, call.reserved_us)
        return call

    def _run(self, steps: Steps) -> Any:
        """Carry out steps in this thread."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._do(step)
                except BaseException as error:  # noqa: BLE001 - every failure goes into the steps, which decide
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value

    def _do(self, step: Step) -> Any:
        if isinstance(step, Pause):
            if step.seconds:
                step.ticket.wait(step.seconds)
            return self.store.now_us()
        if isinstance(step, Reload):
            return self._load_policy()
        if isinstance(step, Post):
            return self.store.post(step.command)
        return self.store.execute(step)

    async def _arun(self, steps: Steps) -> Any:
        """Carry out steps without blocking the event loop."""
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, Pause):
                        if step.seconds:
                            await step.ticket.await_wake(step.seconds)
                        answer: Any = self.store.now_us()
                    elif isinstance(step, (Reload, Post)):
                        answer = self._do(step)
                    else:
                        answer = await self.store.aexecute(step)
                except BaseException as error:  # noqa: BLE001 - every failure goes into the steps, which decide
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value

    def _load_policy(self) -> int:
        """The newest definitions of this process's budgets, as the store has them; the store's time."""
        version, newest = self.store.budgets()
        budgets = [Budget(**newest[name].definition) for name in self._names]
        self.guard.policy = Policy(budgets, version=version, rates=self._rates)
        return self.store.now_us()

    # -- in the background ---------------------------------------------------------------------------------------

    def tend(self) -> None:
        """One round of housekeeping: extend live calls, try kept settlements again, expire what is overdue.

        A background thread does this every few seconds while calls are made.
        """
        now_us = self.store.now_us()
        for call, extended_us in list(self._live.values()):
            if now_us - extended_us >= call.ttl_us // 3 and now_us - call.reserved_us < MAX_LIVE_S * 1e6:
                answer = self.store.execute(Extend(call.id, call.ttl_us))
                if isinstance(answer, Rejected):
                    self._live.pop(call.id, None)
                elif call.id in self._live:
                    self._live[call.id] = (call, now_us)
        for call, command in list(self._kept.values()):
            answer = self.store.execute(command)
            self._kept.pop(call.id, None)
            if isinstance(answer, Rejected):
                log.error("the kept settlement of %s was rejected (%s %s)", call.id, answer.why, answer.detail)
        self.store.sweep()

    def _keep_trying(self, call: Call, command: object) -> None:
        if isinstance(command, (Settle, Release, Charge)):
            if len(self._kept) >= MAX_KEPT:
                log.error("more than %d settlements wait for the store: %s is left to its expiry", MAX_KEPT, call.id)
                return
            self._kept[call.id] = (call, command)

    def _forget(self, call: Call) -> None:
        self._live.pop(call.id, None)
        self._kept.pop(call.id, None)

    def _start_keeper(self) -> None:
        if self._keeper is None or self._keeper_pid != os.getpid():
            self._keeper_pid = os.getpid()
            self._keeper = threading.Thread(target=_keep, args=(weakref.ref(self), self._stop), daemon=True, name="bursar-keeper")
            self._keeper.start()

    def close(self) -> None:
        """Try kept settlements a last time and close the store. Open reservations stay, and expire."""
        self._stop.set()
        try:
            self.tend()
        except StoreError as error:
            log.error("while closing: %s", error)
        self.store.close()

    def __enter__(self) -> Bursar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _keep(held: weakref.ref[Bursar], stop: threading.Event) -> None:
    while not stop.wait(TEND_S):
        bursar = held()
        if bursar is None:
            return
        try:
            bursar.tend()
        except StoreError as error:
            # The store may be back at the next round; without this the thread would end, and with it every extension.
            log.warning("housekeeping: %s", error)
        del bursar


def open_store(url: str, clock: Clock | None = None) -> Store:
    """The store behind a URL. Raises InvalidInput for a URL of no known form, StoreError when it cannot be opened."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "memory":
        from bursar.stores.memory import MemoryStore

        return MemoryStore(clock)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1:
        from bursar.stores.sqlite import SqliteStore

        unknown = options.keys() - {"durability"}
        if not unknown:
            return SqliteStore(unquote(parts.path[1:]), durability=options.get("durability", "full"), clock=clock)
    raise InvalidInput(
        f'{url!r} names no store. Use "memory:", "sqlite:///file.db" or "sqlite:///file.db?durability=process".',
        argument="store",
    )
