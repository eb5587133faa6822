"""The world: virtual time, a heap of what comes next, hosts that live and die, and the store behind a network that fails.

Every step that the guard asks for is a point at which others run, and at which faults strike. The same seed gives the same
history, event for event; `trace` is its checksum.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from random import Random
from typing import Any
from zlib import crc32

from bursar.call import Pause, Publish, Reload
from bursar.commands import Answer, Command, Reserve
from bursar.errors import StoreError
from bursar.testing import ManualClock
from sim.auditor import Auditor
from sim.faults import Faults

START_US = 1_750_000_000_000_000 // 3_600_000_000 * 3_600_000_000 + 3_540_000_000  # a minute before a full hour
MAX_EVENTS = 200_000
TIMEOUT_US = 2_000_000  # after which a command without an answer has failed
SNAPSHOT_OPS = 16  # how many commands a store that loses its tail loses at most

Steps = Generator[Any, Any, None]


class Killed(BaseException):
    """The process is no more."""


class Interrupted(BaseException):
    """The thread is interrupted, or the task cancelled."""


class Host:
    """One process: what its programs share, and what is gone with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.stalled_until_us = 0
        self.bursar: Any = None
        self.store: Any = None
        self.doomed = False  # it dies before it does anything more
        self.inline = False  # the store is in the process itself, and does what it is asked at once
        self.mortal = True  # it may be killed
        self.end: Callable[[], None] = lambda: None


class Task:
    """A program that runs. `turn`: how often it has gone on; what was meant for an earlier turn finds nobody."""

    __slots__ = ("host", "steps", "turn")

    def __init__(self, host: Host, steps: Steps) -> None:
        self.host = host
        self.steps = steps
        self.turn = 0


class World:
    """One history. `make_store`: from a clock to the store, which tells `auditor` of every command."""

    def __init__(self, seed: int, make_store: Callable[[World], Any], faults: Faults, random: Random) -> None:
        self.seed = seed
        self.random = random
        self.faults = faults
        self.now_us = START_US
        self.skew_us = 0  # of the store's clock
        self.clock = ManualClock(START_US)
        self.trace = 0
        self.away_until_us = 0
        self.trusting = False
        self.snapshot: tuple[Any, bytes] | None = None
        self.lost: set[str] = set()  # the ids of commands that a store has lost with its tail
        self._since_snapshot: list[str] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._events = 0
        self._number = 0
        self.server = make_store(self)
        self.auditor = Auditor(self.server.accounts)
        self.log: list[tuple[int, str, Any, Any]] = []  # when, what was published or "", and what came of it

    # -- time

    def at(self, after_us: int, act: Callable[[], None]) -> None:
        """Do something later."""
        self._number += 1
        heapq.heappush(self._heap, (self.now_us + after_us, self._number, act))

    def run(self, until_us: int | None = None) -> None:
        """Let everything happen, or what happens until then."""
        heap = self._heap
        while heap and (until_us is None or heap[0][0] <= until_us):
            self._events += 1
            assert self._events < MAX_EVENTS, "this world does not end"
            self.now_us, _, act = heapq.heappop(heap)
            self.clock.set(self.now_us + self.skew_us)
            act()
        if until_us is not None:
            self.now_us = until_us
            self.clock.set(self.now_us + self.skew_us)

    def latency_us(self) -> int:
        return (
            self.random.randrange(200, 3_000) if not self.faults.hits("slow") else self.random.randrange(10**5, 10**7)
        )

    # -- processes

    def spawn(self, host: Host, steps: Steps, after_us: int = 0) -> None:
        """Run a program in a process: it yields how long it sleeps, or a step that the guard asks for."""
        task = Task(host, steps)
        self.at(after_us, lambda: self._resume(task, 0, None, None))

    def kill(self, host: Host) -> None:
        """As kill -9 does."""
        if host.alive:
            host.alive = False
            host.end()

    def _resume(self, task: Task, turn: int, answer: Any, error: BaseException | None) -> None:
        host = task.host
        if not host.alive or turn != task.turn:
            return
        if host.stalled_until_us > self.now_us:  # it is swapped out, or its laptop sleeps
            self.at(host.stalled_until_us - self.now_us, lambda: self._resume(task, turn, answer, error))
            return
        task.turn += 1
        try:
            step = task.steps.send(answer) if error is None else task.steps.throw(error)
        except StopIteration:
            return
        except Killed:
            self.kill(host)
            return
        if host.doomed:
            self.kill(host)
            return
        if self.faults.hits("kill") and host.mortal:
            if self.random.random() < 0.5 and type(step) is not int:
                self._carry_out(task, step)
            self.kill(host)
            return
        if self.faults.hits("stall"):
            host.stalled_until_us = self.now_us + self.random.choice((10**6, 10**7, 2 * 10**8, 10**9))
        self._carry_out(task, step)

    def _carry_out(self, task: Task, step: Any) -> None:
        turn = task.turn
        if type(step) is int:
            self.at(step, lambda: self._resume(task, turn, None, None))
            return
        if type(step) is Pause:
            self._pause(task, step)
        elif task.host.inline or type(step) is Reload or type(step) is Publish:
            self.at(self.latency_us(), lambda: self._inline(task, turn, step))
        else:
            self._send(task, step)
        if self.faults.hits("interrupt"):  # whatever comes back then finds nobody
            self.at(self.latency_us(), lambda: self._resume(task, turn, None, Interrupted()))

    def _inline(self, task: Task, turn: int, step: Any) -> None:
        """A step that holds the process up until it is done."""
        host = task.host
        if not host.alive or turn != task.turn:
            return
        answer, error = None, None
        try:
            if type(step) is Reload:
                answer = host.bursar._load_policy()
            elif type(step) is Publish:
                answer = host.store.publish(step.definitions, step.kind)
            else:
                answer = host.store.execute(step)
        except StoreError as failure:
            error = failure
        except Killed:
            host.doomed = True
        if host.doomed:
            self.kill(host)
            return
        self._resume(task, turn, answer, error)

    def _pause(self, task: Task, step: Pause) -> None:
        ticket, turn = step.ticket, task.turn

        def wake() -> None:
            if turn == task.turn and task.host.alive:
                ticket.disarm()
                self._resume(task, turn, task.host.store.now_us(), None)

        if step.seconds and ticket.arm(lambda: self.at(0, wake)):
            self.at(int(step.seconds * 1e6) + 1, wake)
        else:
            self.at(0, wake)

    # -- the network

    def _send(self, task: Task, command: Command) -> None:
        """A command on its way to the store, and the answer on its way back; either may be lost, or come twice."""
        faults, turn = self.faults, task.turn

        def reply(answer: Any, error: BaseException | None) -> None:
            if turn == task.turn:
                task.host.store.learn()
                self._resume(task, turn, answer, error)

        def arrive() -> None:
            answer, error = None, None
            if self.trusting and turn != task.turn:
                return  # its caller has gone on without it
            try:
                answer = self.apply(command)
            except StoreError as failure:
                error = failure
            if not faults.hits("reply_lost"):
                self.at(self.latency_us(), lambda: reply(answer, error))

        lost = faults.hits("request_lost")
        if not lost:
            self.at(self.latency_us(), arrive)
        if self.may_come_twice(command) and faults.hits("duplicate"):
            self.at(self.latency_us(), arrive)
        if self.may_come_twice(command) and faults.hits("late_copy"):
            self.at(self.random.choice((10**7, 10**8, 10**9)), arrive)
        if faults.rates:
            self.at(TIMEOUT_US, lambda: reply(None, unreachable()))

    def apply(self, command: Command) -> Answer:
        """What the store makes of a command that has reached it. Raises StoreError while it is away."""
        if self.is_away():
            raise unreachable()
        answer: Answer = self.server.execute(command)
        return answer

    def may_come_twice(self, command: Command) -> bool:
        """A store that trusts its callers looks no id up that was made to be new: nobody may bring one twice."""
        return not self.trusting or bool(getattr(command, "digest", "-"))

    def is_away(self) -> bool:
        return self.now_us < self.away_until_us

    def noted(self, command: Command, answer: Answer, now_us: int) -> None:
        """The store has done this: hold it against what must be."""
        if type(command) is Reserve:  # its caller goes on writing into it
            command = command._replace(complied=dict(command.complied))
        self.log.append((now_us, "", command, answer))
        self.trace = crc32(
            f"{now_us} {type(command).__name__} {command.id} {type(answer).__name__}".encode(), self.trace
        )
        self.auditor.observe(command, answer, now_us)
        if "tail_lost" in self.faults.rates:
            self._since_snapshot.append(command.id)
            if len(self._since_snapshot) >= SNAPSHOT_OPS:
                self.keep()

    def published(self, kind: str, definitions: Any, version: int) -> None:
        self.log.append((max(self.clock.now_us(), self.auditor.books.now_us), kind, definitions, version))
        self.auditor.published(kind, definitions, version)
        if "tail_lost" in self.faults.rates:
            self.keep()

    def keep(self) -> None:
        """What the store has now has reached its disk."""
        self.snapshot = (self.server.copied(), self.auditor.snapshot())
        self._since_snapshot.clear()

    def lose_tail(self) -> None:
        """The store comes back as its disk, or its replica, has it."""
        if self.snapshot is not None:
            self.server.put_back(self.snapshot[0])
            self.auditor.restore(self.snapshot[1])
            self.lost.update(self._since_snapshot)
            self._since_snapshot.clear()


def unreachable() -> StoreError:
    return StoreError("The store cannot be reached. Try again.", fault="unreachable")
