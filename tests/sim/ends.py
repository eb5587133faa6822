"""How calls end: what the store must answer to settlements, releases, expiries, extensions, charges and draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bursar.commands import Answer, Charge, Draw, Drawn, Ended, Expire, Extend, Extended, Rejected, Release, Settle
from sim.books import Broken, Held, Judge, drawn
from sim.stands import Stand


class Ends(Judge):
    """The judgements of all commands but those that begin something."""

    def _settle(self, command: Settle, answer: Answer, now_us: int) -> Iterable[str]:
        call = self.books.calls.get(command.id)
        if call is None:
            self._expect(command, answer, Rejected, "unknown")
            return ()
        content = (command.cost_nanos, dict(command.usage), command.outcome)
        if call.state == "open":
            booked = {
                key: 0 if call.units[key] == "slots" else command.actuals.get(call.units[key], held)
                for key, held in call.amounts.items()
            }
            return self._end(call, "settlement", booked, content, answer, now_us)
        if call.state == "expiry":
            booked = {
                key: 0 if call.units[key] == "slots" else command.actuals.get(call.units[key], held) - call.booked[key]
                for key, held in call.amounts.items()
            }
            return self._correct(call, "correction", booked, content, answer, now_us)
        if (
            call.state in ("settlement", "correction")
            and call.told[:2] == content[:2]
            and (call.state == "correction" or call.told == content)
        ):
            self._expect(command, answer, Ended)
            if not answer.again:  # type: ignore[union-attr]
                raise Broken(f"I6: {command} came twice and was booked twice")
            return call.amounts
        self._expect(command, answer, Rejected, "conflict" if call.state == "settlement" else "ended")
        return call.amounts

    def _release(self, command: Release, answer: Answer, now_us: int) -> Iterable[str]:
        call = self.books.calls.get(command.id)
        if call is None:
            self._expect(command, answer, Rejected, "unknown")
            return ()
        if call.state == "open":
            booked = {key: command.actuals.get(call.units[key], 0) for key in call.amounts}
            return self._end(call, "release", booked, (0, {}, command.outcome), answer, now_us)
        if call.state == "expiry":
            booked = {key: -amount for key, amount in call.booked.items()}
            return self._correct(call, "reversal", booked, None, answer, now_us)
        if call.state in ("release", "reversal"):
            self._expect(command, answer, Ended)
            if not answer.again:  # type: ignore[union-attr]
                raise Broken(f"I6: {command} came twice and was given back twice")
        else:
            self._expect(command, answer, Rejected, "ended")
        return call.amounts

    def _expire(self, command: Expire, answer: Answer, now_us: int) -> Iterable[str]:
        call = self.books.calls.get(command.id)
        if call is None or call.state != "open":
            self._expect(command, answer, Rejected, "unknown" if call is None else "ended")
            return ()
        if now_us < call.expires_us:
            if type(answer) is not Rejected:
                raise Broken(f"I8: {command} came {call.expires_us - now_us} us early, and was answered by {answer}")
            return call.amounts
        booked = {key: held if call.charge and call.units[key] != "slots" else 0 for key, held in call.amounts.items()}
        return self._end(call, "expiry", booked, None, answer, now_us)

    def _extend(self, command: Extend, answer: Answer, now_us: int) -> Iterable[str]:
        call = self.books.calls.get(command.id)
        if call is None or call.state != "open":
            self._expect(command, answer, Rejected, "unknown" if call is None else "ended")
            return ()
        expires_us = max(call.expires_us, now_us + command.ttl_us)
        if type(answer) is not Extended or answer.expires_us != expires_us:
            raise Broken(f"I8: {command} must make it live until {expires_us}, it was {answer}")
        call.expires_us = expires_us
        return ()

    def _end(
        self, call: Held, kind: str, booked: dict[str, int], content: Any, answer: Answer, now_us: int
    ) -> Iterable[str]:
        entry = self._entry(call.id, kind, answer, booked, call.at_us, now_us)
        call.state, call.booked, call.told = kind, booked, content
        if content is not None and (entry.cost_nanos, dict(entry.usage), entry.outcome) != content:
            raise Broken(f"I10: {entry} does not tell {content}")
        crossed = []
        for key, held in call.amounts.items():
            over = max(0, booked[key] - held)
            crossed += self._move(key, held, booked[key], call.at_us, now_us, over)
        self._alerts(crossed, answer)
        return call.amounts

    def _correct(
        self, call: Held, kind: str, booked: dict[str, int], content: Any, answer: Answer, now_us: int
    ) -> Iterable[str]:
        self._entry(call.id + "~", kind, answer, booked, call.at_us, now_us)
        before = self.books.entries[call.id].cost_nanos
        corrected = self.books.entries[call.id + "~"].cost_nanos + before
        if corrected != (0 if content is None else content[0]):
            raise Broken(f"I5: {call.id} was corrected to {corrected}, it is {content}")
        call.state, call.told = kind, content
        crossed = []
        for key, amount in booked.items():
            crossed += self._move(key, 0, amount, call.at_us, now_us, max(0, amount))
        self._alerts(crossed, answer)
        return call.amounts

    def _charge(self, command: Charge, answer: Answer, now_us: int) -> Iterable[str]:
        books = self.books
        known = books.calls.get(command.id)
        if known is not None and known.state == "charge" and known.digest == command.digest:
            self._expect(command, answer, Ended)
            if not answer.again:  # type: ignore[union-attr]
                raise Broken(f"I6: {command} came twice and was booked twice")
            return known.amounts
        if known is not None or command.id in books.entries:
            self._expect(command, answer, Rejected, "conflict")
            return ()
        if type(answer) is Rejected and answer.why == "accounts":
            self.full.add(command.id)
            return ()
        books.calls[command.id] = call = Held(command, now_us, "charge")
        self._entry(command.id, "charge", answer, call.amounts, now_us, now_us)
        crossed = []
        for rule, amount in command.lines:
            stand = self._incurring(rule.key, rule.budget, command.version, now_us)
            stand.look(now_us)
            over = max(0, amount - max(0, stand.available()))
            crossed += self._move(rule.key, 0, amount, now_us, now_us, over)
        self._alerts(crossed, answer)
        return call.amounts

    def _incurring(self, key: str, budget: str, version: int, now_us: int) -> Stand:
        books = self.books
        stand = books.stands.get(key)
        if stand is None:
            stand = Stand(key, books.spec_at(budget, version), now_us)
            self._made(stand)
        elif version >= books.version:
            stand.take(books.specs[budget])
        return stand

    def _draw(self, command: Draw, answer: Answer, now_us: int) -> Iterable[str]:
        books = self.books
        new = [entry for entry in command.entries if entry.id not in books.entries]
        if type(answer) is not Drawn or answer.new != len(new):
            raise Broken(f"I10: {len(new)} entries of {command} are new, it was answered by {answer}")
        lease = books.calls.get(command.id)
        is_open = lease is not None and lease.state == "open"
        crossed = []
        for rule in command.rules if new else ():
            stand = self._incurring(rule.key, rule.budget, command.version, now_us)
            actual = sum(entry.amounts.get(rule.key, 0) for entry in new)
            held = lease.amounts.get(rule.key, 0) if lease is not None and is_open else 0
            paid = min(held, actual) if is_open and lease is not None and rule.key in lease.amounts else 0
            told = books.drawn.setdefault(command.id, {})
            told[rule.key] = told.get(rule.key, 0) + actual
            over = max(0, actual - paid - max(0, stand.available()), command.overruns.get(rule.key, 0))
            crossed += self._move(rule.key, paid, actual, now_us, now_us, over)
            if lease is not None and is_open and paid:
                lease.amounts[rule.key] -= paid
        for entry in new:
            books.entries[entry.id] = entry
            drawn(books, entry)
        if is_open and lease is not None and answer.left != lease.amounts:
            raise Broken(f"I2: the lease {command.id} has {lease.amounts} left, it was told {answer.left}")
        self._alerts(crossed, answer)
        return [rule.key for rule in command.rules if rule.key in books.stands]
