"""Bugs: mutants of the real code, planted one at a time. A simulator that does not catch each of them sees too little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bursar import accounts, booking, clock, guard, keeper, windows
from bursar.commands import Decision, Ended, Entry, Expire, Extend, Release, Reserve, Settle
from bursar.law import POLICY_KEY, ends
from bursar.prices import PriceBook
from sim.planting import Patch, decision, everywhere, function, handler


def _double_settle(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if type(row) is Entry and row.kind == "settlement":
        amounts = dict(row.amounts)
        puts = {}
        for key, amount in amounts.items():
            account = read(key)
            puts[key] = accounts.book(account, 0, amount, row.reserved_us, now_us, 0)
        return Decision(Ended(row, ()), puts)
    return original(read, command, now_us)


def _reserve_twice(original: Any, read: Any, command: Any, now_us: int) -> Any:
    return original(lambda key: None if key == command.id else read(key), command, now_us)


def _room_off_by(one: int) -> Callable[..., Any]:
    def change(original: Any, read: Any, command: Any, now_us: int) -> Any:
        lines = tuple(
            (rule._replace(limit=rule.limit + one) if rule.unit == "USD" else rule, amount)
            for rule, amount in command.lines
        )
        answer, puts = original(read, command._replace(lines=lines), now_us)
        rules = {rule.key: rule for rule, _ in command.lines}
        puts = {
            key: row._replace(rule=rules.get(key, row.rule)) if type(row) is accounts.Account else row
            for key, row in puts.items()
        }
        return Decision(answer, puts)

    return change


def _late_settle_lost(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if type(row) is Entry and row.kind == "expiry":
        return Decision(Ended(row, (), again=True), {})
    return original(read, command, now_us)


def _release_twice(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if type(row) is Entry and row.kind == "release":
        puts = {key: accounts.book(read(key), 1, 0, row.reserved_us, now_us, 0) for key in row.amounts}
        return Decision(Ended(row, ()), puts)
    return original(read, command, now_us)


def _sweep_early(original: Any, read: Any, command: Any, now_us: int) -> Any:
    return original(read, command, now_us + 1)


def _extend_shortens(found: Any, read: Any, command: Any, now_us: int) -> Any:
    return found._replace(
        puts={key: row._replace(expires_us=now_us + command.ttl_us) for key, row in found.puts.items()},
    )


def _extend_forgotten(found: Any, read: Any, command: Any, now_us: int) -> Any:
    return found._replace(puts={})


def _without_alerts(found: Any, read: Any, command: Any, now_us: int) -> Any:
    if type(found.answer) is not Ended:
        return found
    return Decision(found.answer._replace(alerts=()), {k: v for k, v in found.puts.items() if not k.startswith("^")})


def _record_lost(found: Any, read: Any, command: Any, now_us: int) -> Any:
    if type(found.answer) is Ended and now_us % 7 == 0:
        return found._replace(puts={key: row for key, row in found.puts.items() if type(row) is not Entry})
    return found


def _half_moved(found: Any, read: Any, command: Any, now_us: int) -> Any:
    moved = [key for key, row in found.puts.items() if type(row) is accounts.Account]
    if len(moved) > 2 and type(found.answer) is Ended:
        return found._replace(puts={key: row for key, row in found.puts.items() if key != moved[-1]})
    return found


def _slots_kept(original: Any, read: Any, command: Any, now_us: int) -> Any:
    found = original(read, command, now_us)
    if type(found.answer) is not Ended:
        return found
    puts = {
        key: row._replace(reserved=row.reserved + 1)
        if type(row) is accounts.Account and row.rule.kind == "slots"
        else row
        for key, row in found.puts.items()
    }
    return found._replace(puts=puts)


def _expiry_free(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if row is None or type(row) is Entry:
        return original(read, command, now_us)
    return original(lambda key: row._replace(on_expiry="release") if key == command.id else read(key), command, now_us)


def _refund_of_dead(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if type(row) is Entry and row.kind == "settlement":
        amounts = {key: -amount for key, amount in row.amounts.items()}
        return ends._correct(read, row._replace(id=row.id), row.id + "~", amounts, command, -row.cost_nanos, {}, now_us)
    return original(read, command, now_us)


def _fail_open(original: Any) -> Any:
    return lambda self, call, now_us: True


def _settle_reserved(original: Any) -> Any:
    def settle(self: Any, call: Any, usage: Any, now_us: int, **options: Any) -> Any:
        return self.settle_unknown(call, "not looked at", now_us)

    return settle


def _price_of_now(original: Any) -> Any:
    def settle(self: Any, call: Any, usage: Any, now_us: int, **options: Any) -> Any:
        call.book = self.book
        return original(self, call, usage, now_us, **options)

    return settle


def _unknown_is_free(original: Any) -> Any:
    def find(self: Any, provider: str, asked: str, answered: Any, at_us: int, tags: Any) -> Any:
        return original(self, provider, "fine" if asked == "nobody" else asked, answered, at_us, tags)

    return find


def _bucket_off(by: int) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def age(account: Any, now_us: int) -> Any:
            late = by * (account.rule.period_us // 60) if account.rule.kind == "rolling" else 0
            return original(account, now_us - late)

        return age

    return make


def _remainder_lost(original: Any) -> Any:
    def refilled(rule: Any, level: int, remainder: int, at_us: int, now_us: int) -> Any:
        return original(rule, level, 0, at_us, now_us)

    return refilled


def _burst_unbounded(original: Any) -> Any:
    def refilled(rule: Any, level: int, remainder: int, at_us: int, now_us: int) -> Any:
        if now_us <= at_us:
            return level, remainder, at_us
        gained, remainder = divmod((now_us - at_us) * rule.limit + remainder, rule.period_us)
        return level + gained, remainder, now_us

    return refilled


def _wrong_window(original: Any) -> Any:
    def bounds(self: Any, at_us: int) -> Any:
        start, end = original(self, at_us)
        return (start, end) if end is None else (start + 1, end + 1)

    return bounds


def _now_not_reserve_time(original: Any) -> Any:
    return lambda account, held, actual, reserved_us, now_us, overrun: original(
        account, held, actual, now_us, now_us, overrun
    )


def _forgets_kept(original: Any) -> Any:
    return lambda self, command: None


def _limit_of_old(original: Any, read: Any, command: Any, now_us: int) -> Any:
    return original(lambda key: 0 if key == POLICY_KEY else read(key), command, now_us)


def _any_accounts(original: Any, read: Any, command: Any, now_us: int) -> Any:
    return original(read, command._replace(max_accounts=10**9), now_us)


def _conflict_unseen(original: Any, read: Any, command: Any, now_us: int) -> Any:
    row = read(command.id)
    if type(row) is Entry and row.kind == "settlement":
        return Decision(Ended(row, (), again=True), {})
    return original(read, command, now_us)


def _time_runs_back(original: Any) -> Any:
    return lambda self: self._now()


def _block_asleep(original: Any) -> Any:
    return lambda account: ()


def _overrun_untold(original: Any) -> Any:
    return lambda account, held, actual, reserved_us, now_us, overrun: original(
        account, held, actual, reserved_us, now_us, 0
    )


def _floats(original: Any) -> Any:
    def settle(self: Any, call: Any, usage: Any, now_us: int, **options: Any) -> Any:
        steps = original(self, call, usage, now_us, **options)
        step = next(steps)
        while True:
            try:
                if type(step) is Settle:
                    cost = int(step.cost_nanos * 1.001)
                    step = step._replace(cost_nanos=cost, actuals={**step.actuals, "USD": cost})
                step = steps.send((yield step))
            except StopIteration as stop:
                return stop.value

    return settle


BUGS: dict[str, Patch] = {
    "a settlement that comes twice is booked twice": handler(Settle, _double_settle),
    "a reservation that comes twice is held twice": handler(Reserve, _reserve_twice),
    "the limit is one too high": handler(Reserve, _room_off_by(1)),
    "the limit is one too low": handler(Reserve, _room_off_by(-1)),
    "a late settlement is lost": handler(Settle, _late_settle_lost),
    "a release that comes twice gives back twice": handler(Release, _release_twice),
    "a settled call is refunded when it is released": handler(Release, _refund_of_dead),
    "the sweep comes a microsecond early": handler(Expire, _sweep_early),
    "an extension is not kept": decision(Extend, _extend_forgotten),
    "an extension shortens": decision(Extend, _extend_shortens),
    "the store's time runs back": function(clock.StoreClock, "now_us", _time_runs_back),
    "a crossed mark is not told": decision(Settle, _without_alerts),
    "a crossed mark is told at every settlement": everywhere("still_crossed", lambda original: lambda account: 0),
    "a block does not block": everywhere("in_force", _block_asleep),
    "a record is lost": decision(Settle, _record_lost),
    "one account of a call does not move": decision(Settle, _half_moved),
    "slots are kept after an expiry": handler(Expire, _slots_kept),
    "what has expired is free": handler(Expire, _expiry_free),
    "a process goes on while the store is away": function(guard.Guard, "goes_unguarded", _fail_open),
    "the real cost is not looked at": function(booking.Booking, "settle", _settle_reserved),
    "the real cost is counted in floats": function(booking.Booking, "settle", _floats),
    "a call is settled at the prices of another table": function(booking.Booking, "settle", _price_of_now),
    "an unknown price is another model's": function(PriceBook, "_find", _unknown_is_free),
    "a bucket leaves the window late": everywhere("age", _bucket_off(1)),
    "a bucket leaves the window early": everywhere("age", _bucket_off(-1)),
    "what was gained of a unit is lost": function(accounts, "_refilled", _remainder_lost),
    "a rate saves up beyond its burst": function(accounts, "_refilled", _burst_unbounded),
    "windows begin late": function(windows.Window, "bounds", _wrong_window),
    "a rolling window ages from the settlement": everywhere("book", _now_not_reserve_time),
    "an overrun is not told": everywhere("book", _overrun_untold),
    "a settlement that the store could not take is forgotten": function(keeper.Keeper, "keep", _forgets_kept),
    "a process with an old policy is served": handler(Reserve, _limit_of_old),
    "max_accounts is ignored": handler(Reserve, _any_accounts),
    "another cost under the same id is taken for the same": handler(Settle, _conflict_unseen),
}
