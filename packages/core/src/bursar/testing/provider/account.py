"""The provider's own account: every request it got, what was generated for it, and what it billed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bursar.testing.provider.script import Counts


@dataclass(slots=True, kw_only=True)
class Served:
    """One request, on the account from the moment when it was accepted or refused, before a byte of the answer is sent.

    `input_tokens` and `output_tokens` are totals that hold the other counts. A call is billed in full from its
    acceptance: also when the client went away (`client_gone`), the stream was dropped or no usage was told. 4xx and 5xx
    are not billed. `done` turns true when nothing more will be sent. `endpoint` is such as `openai.chat`, or the path
    where nobody serves it.
    """

    id: str  # the id of the answer, as sent
    endpoint: str
    model: str
    stream: bool
    status: int
    billed: bool
    cost_nanos: int
    request: Mapping[str, Any]
    fault: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    events_sent: int = 0
    client_gone: bool = False
    done: bool = False


def served(counts: Counts, **fields: Any) -> Served:
    """An entry with its counts."""
    return Served(**asdict(counts), **fields)


class Account:
    """All entries in order of acceptance, and how many requests are in flight; safe for threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: list[Served] = []
        self.requests = 0
        self.in_flight = 0
        self.max_in_flight = 0

    def arrive(self) -> None:
        """A request was read."""
        with self._changed:
            self.requests += 1
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            self._changed.notify_all()

    def leave(self) -> None:
        """All that will be sent for a request was sent."""
        with self._changed:
            self.in_flight -= 1
            self._changed.notify_all()

    def enter(self, entry: Served) -> None:
        """Put a request on the account."""
        with self._changed:
            self._entries.append(entry)
            self._changed.notify_all()

    def entries(self) -> list[Served]:
        """Copies of the entries as they stand."""
        with self._changed:
            return [replace(entry) for entry in self._entries]

    def wait_requests(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` requests are on the account; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._entries) >= count, timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self.in_flight == 0, timeout_s)
