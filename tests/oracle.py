"""An oracle for the law, written from the design alone: a list of facts, and every balance worked out anew from all of them.

It knows nothing of `bursar.law`, `bursar.accounts` or `bursar.windows`: it is slow on purpose, in the plainest terms there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import cache
from zoneinfo import ZoneInfo

MINUTE_US = 60_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def us(at: datetime) -> int:
    """A time as microseconds since the epoch."""
    return (at - EPOCH) // timedelta(microseconds=1)


def wall(at_us: int, zone: str) -> datetime:
    """What the clock on the wall shows."""
    return (EPOCH + timedelta(microseconds=at_us)).astimezone(ZoneInfo(zone))


@cache
def begins(day: date, zone: str) -> int:
    """The first instant at which the zone's calendar shows this day or a later one, found by looking at every minute."""
    noon = us(datetime(day.year, day.month, day.day, 12, tzinfo=UTC))
    for minute in range(-48 * 60, 24 * 60):
        at_us = noon + minute * MINUTE_US
        if wall(at_us, zone).date() >= day:
            return at_us
    raise AssertionError("no such day")


@cache
def hour_begins(at_minute_us: int, zone: str) -> bool:
    """Whether the wall clock strikes a full hour at this minute, or shows another hour than a moment before."""
    now, before = wall(at_minute_us, zone), wall(at_minute_us - 1, zone)
    return now.minute == 0 or (now.date(), now.hour) != (before.date(), before.hour)


def first_days(name: str, day: date) -> tuple[date, date]:
    """The first day of the calendar unit that holds the day, and that of the next unit, by counting days."""

    def label(one: date) -> tuple[int, ...]:
        if name == "week":
            return one.isocalendar()[:2]
        parts = {"day": one.toordinal(), "month": one.month, "quarter": (one.month + 2) // 3, "year": 0}
        return (one.year, parts[name])

    first = following = day
    while label(first - timedelta(days=1)) == label(day):
        first -= timedelta(days=1)
    while label(following) == label(day):
        following += timedelta(days=1)
    return first, following


@cache
def window_at(name: str, zone: str, at_us: int) -> tuple[int, int | None]:
    """The half-open window of this name that holds the instant."""
    if name == "total" or name.startswith("rolling"):
        return 0, None
    minute_us = at_us // MINUTE_US * MINUTE_US
    if name == "minute":
        return minute_us, minute_us + MINUTE_US
    if name == "hour":
        start_us, end_us = minute_us, minute_us + MINUTE_US
        while not hour_begins(start_us, zone):
            start_us -= MINUTE_US
        while not hour_begins(end_us, zone):
            end_us += MINUTE_US
        return start_us, end_us
    # the last day that has begun: a clock that is set back over midnight shows yesterday once more, and it is today still
    day = wall(at_us, zone).date()
    while begins(day + timedelta(days=1), zone) <= at_us:
        day += timedelta(days=1)
    first, following = first_days(name, day)
    return begins(first, zone), begins(following, zone)


@dataclass
class Spec:
    """A budget as the oracle sees it. `period_s`: of a rate."""

    name: str
    unit: str
    limit: int
    window: str = "total"
    zone: str = "UTC"
    period_s: int = 0
    per_run: bool = False
    enforce: bool = True
    marks: tuple[tuple[int, str], ...] = ()  # percent of the limit, and the action; rising

    @property
    def rolling_us(self) -> int:
        """The length of a rolling window; 0 of all others."""
        rolling = self.window.startswith("rolling")
        return int(self.window[8:-1]) * SECONDS[self.window[-1]] * 1_000_000 if rolling else 0

    def reached_at(self, index: int) -> int:
        """The amount of a mark, a fraction of a unit rounded up."""
        return -(-self.limit * self.marks[index][0] // 100)


Key = tuple[str, str, int]  # the budget's name, the run ("" where the budget has one account), where the window begins


@dataclass
class Held:
    """A reservation, from its begin to its end and after."""

    id: str
    run: str
    amounts: dict[str, int]  # by unit
    keys: dict[Key, int]
    at_us: int
    expires_us: int
    charge: bool
    state: str = "open"


@dataclass
class Move:
    """Something that happened to an account: `held` given back, `spent` booked, in the window of the reserve time."""

    key: Key
    at_us: int
    reserved_us: int
    held: int
    spent: int
    overrun: int


@dataclass
class Oracle:
    """All that has happened, and what follows from it."""

    specs: list[Spec]
    reservations: dict[str, Held] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    ended: list[tuple[str, str]] = field(default_factory=list)  # kind and id of every record, in order
    touched: set[Key] = field(default_factory=set)
    told: list[tuple[Key, int]] = field(
        default_factory=list
    )  # every crossing of a mark: the account, the mark's number

    def spec(self, key: Key) -> Spec:
        return next(spec for spec in self.specs if spec.name == key[0])

    def key(self, spec: Spec, run: str, now_us: int) -> Key:
        return spec.name, run if spec.per_run else "", window_at(spec.window, spec.zone, now_us)[0]

    # -- what follows from the facts -------------------------------------------------------------------------------

    def reserved(self, key: Key) -> int:
        return sum(held.keys.get(key, 0) for held in self.reservations.values() if held.state == "open")

    def leaves(self, move: Move, spec: Spec) -> int:
        """When the move's bucket leaves a rolling window: when its end lies a whole length back."""
        width_us = spec.rolling_us // 60
        return (move.reserved_us // width_us + 1) * width_us + spec.rolling_us

    def spent(self, key: Key, now_us: int) -> int:
        spec = self.spec(key)
        moves = [move for move in self.moves if move.key == key]
        if spec.rolling_us:
            moves = [move for move in moves if self.leaves(move, spec) > now_us]
        return sum(move.spent for move in moves)

    def overrun(self, key: Key) -> int:
        return sum(move.overrun for move in self.moves if move.key == key)

    def level(self, key: Key, now_us: int) -> Fraction:
        """A rate's level: it gains all the time up to the limit, and every move goes off it or back to it."""
        spec = self.spec(key)
        gain = Fraction(spec.limit, spec.period_s * 1_000_000)
        level, then = Fraction(spec.limit), 0
        for move in [m for m in self.moves if m.key == key]:
            level = min(Fraction(spec.limit), level + gain * (move.at_us - then))
            level, then = min(Fraction(spec.limit), level - move.spent + move.held), move.at_us
        return min(Fraction(spec.limit), level + gain * (now_us - then))

    def available(self, key: Key, now_us: int) -> int:
        spec = self.spec(key)
        if spec.period_s:
            return self.level(key, now_us).__floor__()
        return spec.limit - self.spent(key, now_us) - self.reserved(key)

    def room_in_us(self, key: Key, asked: int, now_us: int) -> int | None:
        """How long until time alone makes room."""
        spec = self.spec(key)
        if asked > spec.limit:
            return None
        if spec.period_s:
            return (Fraction(asked - self.level(key, now_us)) * spec.period_s * 1_000_000 / spec.limit).__ceil__()
        if spec.window.startswith("rolling"):
            length_us = int(spec.window[8:-1]) * SECONDS[spec.window[-1]] * 1_000_000
            width_us = length_us // 60
            leaving = sorted(
                {(m.reserved_us // width_us + 1) * width_us + length_us for m in self.moves if m.key == key}
            )
            fits = (at for at in leaving if at > now_us and self.available(key, at) >= asked)
            found = next(fits, None)
            return None if found is None else found - now_us
        end_us = window_at(spec.window, spec.zone, now_us)[1]
        return None if end_us is None else end_us - now_us

    def holds(self, key: Key, index: int, now_us: int) -> bool:
        """Whether a mark acts on a reservation that is asked for now."""
        spec = self.spec(key)
        at, action = spec.reached_at(index), spec.marks[index][1]
        spent = self.spent(key, now_us)
        if action in ("ask", "kill"):
            return (key, index) in self.told and (spent >= at or not spec.rolling_us)
        return action != "notify" and spent + self.reserved(key) >= at

    def acts(self, run: str, amounts: dict[str, int], now_us: int) -> dict[Key, list[int]]:
        """The marks that act on a call, by account."""
        lines = self.lines(run, amounts, now_us)
        found = {key: [i for i in range(len(self.spec(key).marks)) if self.holds(key, i, now_us)] for key in lines}
        return {key: held for key, held in found.items() if held}

    def crossing(self, key: Key, before: int, now_us: int) -> None:
        """Note the marks that this move has reached: once, or each time anew where a rolling window let them go."""
        spec, after = self.spec(key), self.spent(key, now_us)
        for index in range(len(spec.marks)):
            at = spec.reached_at(index)
            first = before < at if spec.rolling_us else (key, index) not in self.told
            if after >= at and first:
                self.told.append((key, index))

    def all_room_in_us(self, keys: set[Key], asked: dict[Key, int], now_us: int) -> int | None:
        """How long until time alone makes room on all of these accounts."""
        waits = [self.room_in_us(key, asked[key], now_us) for key in keys]
        return None if None in waits else max(us for us in waits if us is not None)

    # -- what happens ----------------------------------------------------------------------------------------------

    def lines(self, run: str, amounts: dict[str, int], now_us: int) -> dict[Key, int]:
        return {self.key(spec, run, now_us): amounts[spec.unit] for spec in self.specs if spec.unit in amounts}

    def short(self, run: str, amounts: dict[str, int], now_us: int) -> set[Key]:
        """The accounts that cannot hold what is asked of them."""
        lines = self.lines(run, amounts, now_us)
        return {key for key, asked in lines.items() if asked > self.available(key, now_us)}

    def reserve(
        self, id: str, run: str, amounts: dict[str, int], now_us: int, ttl_us: int, *, charge: bool
    ) -> set[Key]:
        """The accounts that refuse for want of room; none when the amounts are held."""
        refusing = {key for key in self.short(run, amounts, now_us) if self.spec(key).enforce}
        if not refusing:
            keys = self.lines(run, amounts, now_us)
            self.reservations[id] = Held(id, run, amounts, keys, now_us, now_us + ttl_us, charge)
            self.touched |= set(keys)
            for key, amount in keys.items():
                if self.spec(key).period_s:
                    self.moves.append(Move(key, now_us, now_us, -amount, 0, 0))
        return refusing

    def _move(self, held: Held, now_us: int, spent: dict[Key, int], given_back: bool, before: dict[Key, int]) -> None:
        """Book by account; `before` is what had been booked or held, which an overrun exceeds."""
        for key, amount in held.keys.items():
            if self.spec(key).unit == "slots":
                continue
            booked = spent[key]
            over = max(0, booked - before[key]) if given_back else max(0, booked)
            back = amount if given_back else 0
            spent_before = self.spent(key, now_us)
            self.moves.append(Move(key, now_us, held.at_us, back, booked, over))
            self.crossing(key, spent_before, now_us)

    def settle(self, id: str, actuals: dict[str, int], now_us: int) -> None:
        held = self.reservations[id]
        full = {key: actuals.get(self.spec(key).unit, amount) for key, amount in held.keys.items()}
        if held.state == "open":
            self._move(held, now_us, full, True, held.keys)
            held.state = "settled"
            self.ended.append(("settlement", id))
        else:
            assert held.state == "expired"
            booked = held.keys if held.charge else dict.fromkeys(held.keys, 0)
            self._move(held, now_us, {key: full[key] - booked[key] for key in full}, False, booked)
            held.state = "corrected"
            self.ended.append(("correction", id))

    def release(self, id: str, now_us: int) -> None:
        held = self.reservations[id]
        if held.state == "open":
            self._move(held, now_us, dict.fromkeys(held.keys, 0), True, held.keys)
            held.state = "released"
            self.ended.append(("release", id))
        else:
            assert held.state == "expired"
            booked = held.keys if held.charge else dict.fromkeys(held.keys, 0)
            self._move(held, now_us, {key: -amount for key, amount in booked.items()}, False, booked)
            held.state = "reversed"
            self.ended.append(("reversal", id))

    def draw(self, id: str, spent: dict[str, dict[Key, int]], overruns: dict[Key, int], now_us: int) -> None:
        """Book what was spent on a lease, by entry and account: out of what it still holds, as far as that goes."""
        held = self.reservations[id]
        for key in next(iter(spent.values())):
            actual = sum(amounts[key] for amounts in spent.values())
            paid = min(held.keys[key], actual) if held.state == "open" and key in held.keys else 0
            uncovered = max(0, actual - paid - max(0, self.available(key, now_us)), overruns[key])
            if paid:
                held.keys[key] -= paid
            self.touched.add(key)
            spent_before = self.spent(key, now_us)
            self.moves.append(Move(key, now_us, now_us, paid, actual, uncovered))
            self.crossing(key, spent_before, now_us)
        self.ended += [("settlement", entry) for entry in spent]

    def due(self, now_us: int) -> list[Held]:
        return [held for held in self.reservations.values() if held.state == "open" and held.expires_us <= now_us]

    def sweep(self, now_us: int) -> int:
        due = self.due(now_us)
        for held in due:
            self._move(held, now_us, held.keys if held.charge else dict.fromkeys(held.keys, 0), True, held.keys)
            held.state = "expired"
            self.ended.append(("expiry", held.id))
        return len(due)

    def charge(self, id: str, run: str, amounts: dict[str, int], now_us: int) -> None:
        for key, amount in self.lines(run, amounts, now_us).items():
            uncovered = max(0, amount - max(0, self.available(key, now_us)))
            self.touched.add(key)
            spent_before = self.spent(key, now_us)
            self.moves.append(Move(key, now_us, now_us, 0, amount, uncovered))
            self.crossing(key, spent_before, now_us)
        self.ended.append(("charge", id))
