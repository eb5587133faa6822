"""The law: what every command does to accounts, as one pure function `decide`, without I/O and without a clock.

A store's whole state is rows by key. An account's key is the JSON text that its rule carries. A reservation stands
under its id while it is open; the entry that ends it then takes its place, so that the row under an id says which of
the states of I5 it is in. The key `ID~` holds the one correction of an expired reservation, `#NAME` the number of a
budget's accounts, `^ID` an alert, `@policy` the newest version of the policy, and `@operator` the operator's public key.
`decide` reads rows through a function and returns the rows to put, which the store must put all together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bursar.commands import Charge, Command, Decision, Draw, Expire, Extend, Release, Reserve, Settle, Tell
from bursar.law.ends import difference, expire, extend, release, settle
from bursar.law.incurred import charge, draw, tell
from bursar.law.reserving import reserve
from bursar.law.standing import OPERATOR_KEY, POLICY_KEY, Read

__all__ = ["OPERATOR_KEY", "POLICY_KEY", "decide", "difference"]


def decide(read: Read, command: Command, now_us: int) -> Decision:
    """What `command` does at `now_us` to the rows that `read` shows. Pure: it changes nothing itself."""
    return _HANDLERS[type(command)](read, command, now_us)


_HANDLERS: dict[type, Callable[[Read, Any, int], Decision]] = {
    Reserve: reserve,
    Settle: settle,
    Release: release,
    Extend: extend,
    Expire: expire,
    Charge: charge,
    Draw: draw,
    Tell: tell,
}
