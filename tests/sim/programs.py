"""Programs: processes whose agents make calls through the real guard, with the keeper of each."""

from __future__ import annotations

import contextlib
import os
from itertools import count
from random import Random
from typing import Any

from bursar import Bursar, Usage
from bursar.call import Call
from bursar.errors import BursarError, StoreError
from bursar.reservation import Block, Reservation
from sim.befalling import operator, sweeper, weather
from sim.books import Broken
from sim.market import Fact, Refusal, answer, book, cost_nanos
from sim.policies import LEVELS, budgets, usd
from sim.wire import Wire
from sim.world import Host, Interrupted, Steps, World

MAX_HOSTS = 6
ONE = Usage(input_tokens=1, output_tokens=1)
SAFETY_US = 150_000_000  # how long faults strike
LIVENESS_US = 2_600_000_000  # the longest stall, the longest time to live, and a sweep


class Scenario:
    """Who does what in one world. `strict`: every dollar budget bounds its calls from above."""

    leased = False

    def __init__(self, world: World, random: Random, *, calls: int, scale: int = 1) -> None:
        self.world = world
        self.random = random
        self.strict = random.random() < 0.5
        self.charge_on_expiry = random.random() < 0.8
        self.open = random.random() < 0.1
        self.max_accounts = random.choice((1_000_000,) * 6 + (3,))
        self.levels = LEVELS[: random.choice((1, 2, 2, 3, 3, 4, 6, 8) if not self.leased else (1, 2, 3))]
        self.scale = scale
        self.budgets = budgets(
            random, self.levels, strict=self.strict, open=self.open, scale=scale, beside=0.0 if self.leased else 0.3
        )
        self.calls = calls
        self.facts: dict[str, Fact] = {}
        self.hosts: list[Host] = []
        self.table = 0
        self.over = False
        self.lowered = False
        self.ids = count(1)
        self.given_ids, self.variety = True, 3  # whether ids are used again; how many runs there are

    # -- processes

    def open_store(self, host: Host) -> Any:
        """The store as a process has it."""
        return Wire(self.world, host)

    def start(self, calls: int, *, first: bool = False) -> None:
        """Start a process with some agents, which make so many calls together."""
        world = self.world
        host = Host(f"h{len(self.hosts)}")
        self.hosts.append(host)
        host.store = self.open_store(host)
        host.bursar = Bursar(
            host.store,
            self.budgets if first else None,
            prices=book(self.table),
            detectors="off",
            on_expiry="charge" if self.charge_on_expiry else "release",
            max_accounts=self.max_accounts,
            ids=lambda: f"c{next(self.ids):05}",
        )
        host.bursar._driver.keeper._pid = os.getpid()  # its rounds are a program here, not a thread
        wire = getattr(host.store, "shared", host.store)
        wire.reliable = False
        agents = self.random.choice((1, 2, 3, 4))
        left = [calls]
        for number in range(agents):
            world.spawn(host, self.agent(host, f"a{number}", left), self.random.randrange(10**6))
        world.spawn(host, self.keeper(host), self.random.randrange(5 * 10**6))
        before = host.end

        def end() -> None:
            before()
            host.bursar._driver.keeper.forget_all()
            if len(self.hosts) < MAX_HOSTS and not self.over:
                world.at(self.random.randrange(10**5, 10**7), lambda: self.start(left[0]))

        host.end = end

    def keeper(self, host: Host) -> Steps:
        """The rounds of the process's housekeeping."""
        keeper = host.bursar._driver.keeper
        while not self.over:
            yield 5_000_000 if self.world.faults.on else 120_000_000
            try:
                keeper.look()
                keeper.tend()
            except StoreError:
                continue

    # -- agents

    def agent(self, host: Host, name: str, left: list[int]) -> Steps:
        random = self.random
        while left[0] > 0 and host.alive:
            left[0] -= 1
            yield random.choice((1_000, 100_000, 500_000, 2_000_000))
            kind = random.random()
            if kind < 0.85:
                yield from self.model_call(host, name)
            elif kind < 0.93:
                yield from self.tool_call(host, name)
            else:
                yield from self.cost_outside(host, name)

    def tags(self, agent: str) -> dict[str, str]:
        random = self.random
        tags = {level: f"{level[0]}{random.randrange(min(2, self.variety))}" for level in self.levels[1:]}
        if "agent" in tags:
            tags["agent"] = agent
        return {"org": "acme", "run": f"r{random.randrange(self.variety)}"} | tags

    def model_call(self, host: Host, agent: str) -> Steps:
        """One call of a model, and perhaps the same call once more."""
        random, faults = self.random, self.world.faults
        model = random.choice(("fine", "fine", "coarse"))
        if faults.hits("unpriced"):
            model = "nobody"
        most: int | None = random.choice((1, 16, 40, None))
        tokens = random.randrange(1, 200)
        again = self.given_ids and faults.hits("again")
        id = f"g{next(self.ids):05}" if again else None
        tags, ttl_s = self.tags(agent), random.choice((600.0, 600.0, 60.0, 5.0))
        if model == "fine" and random.random() < 0.4:
            tokens, most = self.edge(host, tags) or tokens, 1
        for _ in range(2 if again else 1):
            with host.bursar.scope(**tags):
                call = host.bursar._make.model(
                    "openai", model, input_tokens=tokens, max_output_tokens=most, ttl_s=ttl_s, id=id
                )
            call.book = book(self.facts[id].table if id in self.facts else self.table)
            yield from self.guarded(host, call, tokens, given=again)

    def edge(self, host: Host, tags: dict[str, str]) -> int | None:
        """So many input tokens that a call with one token of output just fits, or just does not."""
        stands = self.world.auditor.books.stands
        left = [
            stand.available()
            for stand in stands.values()
            if stand.spec.unit == "USD" and stand.spec.enforce and 4 < stand.available() < 3_000
        ]
        return max(1, self.random.choice(left) - 3 + self.random.randrange(-1, 2)) if left else None

    def guarded(self, host: Host, call: Call, tokens: int, *, given: bool) -> Steps:
        """As `with bursar.call(...)` has it: reserve, send, settle, whatever comes between."""
        driver, world = host.bursar._driver, self.world
        fact = self.facts.get(call.id)
        if fact is None:
            fact = self.facts[call.id] = Fact(call.id, call.model, self.table, tokens, self.strict, given=given)
        block = Block(driver, call)
        try:
            yield from driver._reserving(call, True)
        except (BursarError, Interrupted):
            driver._undo(call)
            return
        error: BaseException | None = None
        try:
            self.dispatched(host, call, fact)
            slow = world.faults.hits("overdue")
            yield int(call.ttl_us * 1.3) if slow else self.random.randrange(10**5, 5 * 10**6)
            if fact.outcome == "refused":
                error = Refusal()
            elif fact.outcome == "timeout":
                error = TimeoutError()
        except Interrupted as interrupt:
            error = interrupt
        yield from self.ended(host, block, fact, error)
        if fact.ended and world.faults.hits("end_again"):  # a mistake of the program's: what has ended stays as it is
            with contextlib.suppress(BursarError, Interrupted):
                again = (block._reservation._release("again"), block._reservation._settle(Usage(input_tokens=1)))
                yield from self.random.choice(again)

    def dispatched(self, host: Host, call: Call, fact: Fact) -> None:
        """I12: nothing is sent that was not granted, unless every budget of it lets it go while the store is away."""
        world = self.world
        if call.state == "unguarded":
            if not self.open:
                raise Broken(f"I12: {call.id} was sent unguarded, and its budgets are closed")
            fact.rejected = fact.rejected or bool(fact.outcome)  # it cannot know when its first attempt was reserved
        elif call.id not in world.auditor.granted and not host.inline:
            raise Broken(f"I12: {call.id} was sent, and nobody has granted it")
        if self.leased:
            holder = host.store._tender.books._holders.get(call.id)
            fact.lease = "" if holder is None else holder.id
        most = Reservation(host.bursar._driver, call).max_output_tokens
        assert most is not None
        if not fact.outcome:
            fact.table = int(call.book is book(1))
            if cost_nanos(fact.table, call.model, call.reserved_us, 1, 1) != call.price.cost_nanos(ONE):
                fact.strict = self.strict = False  # the price has changed between the estimate and the store's time
        answer(fact, call, most, self.random, world.faults)

    def ended(self, host: Host, block: Block, fact: Fact, error: BaseException | None) -> Steps:
        reservation = block._reservation
        try:
            if error is not None:
                steps = block._leaving(error)
                if steps is not None:
                    yield from steps
                elif host.bursar._driver.keeper.keeps(
                    block._call
                ):  # it was interrupted: it is told again in the background
                    fact.kept = host
                    return
                fact.ended = fact.ended or ("released" if fact.outcome == "refused" else "estimated")
            elif fact.outcome == "cut":
                yield from reservation._settle_unknown("cut", known=fact.usage)
                fact.ended = fact.ended or "estimated"
            elif fact.outcome == "no_usage":
                yield from reservation._settle({"choices": []})
                fact.ended = fact.ended or "estimated"
            else:
                yield from reservation._settle(fact.usage)  # of a tool None: it costs what it said
                fact.ended = fact.ended or ("estimated" if fact.outcome == "uncounted" else "settled")
        except StoreError:
            fact.kept = host
        except Interrupted as interrupt:
            fact.rejected = True
            if error is None:
                yield from self.ended(host, block, fact, interrupt)
        except BursarError:  # it has ended otherwise: by an operator, or in another process
            fact.rejected = True

    def tool_call(self, host: Host, agent: str) -> Steps:
        cost = self.random.randrange(1, 300)
        with host.bursar.scope(**self.tags(agent)):
            call = host.bursar._make.tool("search", cost=usd(cost))
        driver = host.bursar._driver
        block = Block(driver, call)
        try:
            yield from driver._reserving(call, True)
        except (BursarError, Interrupted):
            driver._undo(call)
            return
        fact = self.facts[call.id] = Fact(call.id, "", 0, 0, self.strict, bill_nanos=cost, outcome="tool")
        try:
            yield self.random.randrange(10**5, 10**6)
        except Interrupted as interrupt:
            yield from self.ended(host, block, fact, interrupt)
        else:
            yield from self.ended(host, block, fact, None)

    def cost_outside(self, host: Host, agent: str) -> Steps:
        """A cost that has been incurred: it is told until it is on the books."""
        cost, id = self.random.randrange(1, 200), f"g{next(self.ids):05}"
        fact = self.facts[id] = Fact(id, "", 0, 0, strict=False, bill_nanos=cost, outcome="charge")
        tags = self.tags(agent)
        for _ in range(4):
            try:
                with host.bursar.scope(**tags):
                    steps = host.bursar._charging(usd(cost), None, id=id)
                    step = next(steps)
                while True:
                    try:
                        step = steps.send((yield step))
                    except StoreError as error:
                        step = steps.throw(error)
            except StopIteration:
                fact.ended = "settled"
                return
            except (BursarError, Interrupted):
                fact.rejected = True
                yield 1_000_000

    def run(self) -> None:
        """The safety phase with faults, then the liveness phase without."""
        world = self.world
        nobody = Host("outside")
        nobody.inline = True
        nobody.mortal = False  # somebody sweeps, when every process is gone too
        hosts = self.random.choice((1, 1, 2, 2, 3))
        for number in range(hosts):
            self.start(self.calls // hosts, first=number == 0)
        for program in (operator, weather, sweeper):
            world.spawn(nobody, program(self))
        world.run(world.now_us + SAFETY_US)
        world.faults.end()
        world.run(world.now_us + 50_000_000)
        world.run(world.now_us + LIVENESS_US)
        self.over = True
        world.run()
